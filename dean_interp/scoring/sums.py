"""Running sums over examples: a scoring pass folds every pair of activations and gradients into them."""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch

Fold = Literal["value", "size", "square"]
"""What of an example's effect is added up: its value, its absolute value, or its square."""


class Sums:
    """Running sums of some sites, in float32, on the device of each site's matrix (`matrices.home`).

    Per neuron: activation * gradient by group of examples, activation, squared activation. Per weight: x' @ gradient,
    and the square of what its matrix reads. Of an example's effect the value, size or square is added up (`fold`); for
    squares of neurons each example is a group, whose effect is kept with its sign.
    Hand every batch to `begin` before its pass, and its losses to `add_losses` after.
    """

    def __init__(
        self,
        model: HookedModel,
        sites: Sequence[Site],
        *,
        groups: Int[Tensor, " example"],
        rows_each: int,
        fold: Fold,
    ) -> None:
        """Begin with zeros.

        Args:
            groups: the group of each example, from 0.
            rows_each: so many rows of a batch that follow each other make one example (2: a safe and an unsafe answer).
            fold: what of an example's effect is added up.
        """
        self.sites, self.rows_each, self.groups = sites, rows_each, groups
        self.fold: Fold = fold
        self.sums = {"loss": torch.zeros(len(groups)), "n_positions": torch.zeros((), dtype=torch.int64)}
        for site in sites:
            matrix = site if site.unit == "weight" else Site(site.layer, "out")
            n_in, n_out = shape(model, matrix)
            sizes: dict[str, tuple[int, ...]] = {"square": (n_in,), "effect": (n_in, n_out)}
            if site.unit == "neuron":
                sizes |= {"sum": (n_in,), "effect": (int(groups.max()) + 1, n_in)}
            for kind, size in sizes.items():
                self.sums[f"{kind}/{site}"] = torch.zeros(size, device=home(model, matrix))

    def begin(self, batch: Batch) -> None:
        """Say which batch the next pairs belong to."""
        answers = torch.zeros(len(batch.tokens), dtype=torch.int64, device=batch.answer.device)
        answers[batch.read_row] = batch.answer
        self.examples: Int[Tensor, " example"] = answers[:: self.rows_each] // self.rows_each
        self.real = batch.real
        self.folded: set[Site] = set()

    def add(self, site: Site, x: Float[Tensor, "batch pos d_in"], gradient: Float[Tensor, "batch pos d_out"]) -> None:
        """Fold one batch at one site in. Raises `InputError` where an example's gradient is not finite."""
        x, gradient = x.float(), gradient.float()
        self._refuse_not_finite(site, gradient)
        if site.unit == "neuron":
            self.fold_neurons(site, x, torch.einsum("bpn,bpn->bn", x, gradient))
            return
        real = self.real.to(x.device)
        self._add_weights(self.sums[f"effect/{site}"], x, gradient, real)
        square = self.sums[f"square/{site}"]
        square += (x * real[..., None]).square().sum((0, 1)).to(square.device)
        self.folded.add(site)

    def fold_neurons(
        self, site: Site, x: Float[Tensor, "batch pos d_mlp"], effect: Float[Tensor, "batch d_mlp"]
    ) -> None:
        """Fold one batch's effects at a site of neurons in, with the activations that they come from."""
        total = self.sums[f"effect/{site}"]
        groups = self.groups[self.examples.cpu()].to(total.device)
        # The rows of an example are one effect, whose size is taken after they are added.
        effect = effect.unflatten(0, (-1, self.rows_each)).sum(1)
        # Squares are taken at the end: each example is a group of its own, and keeps its signed effect.
        if self.fold == "size":
            effect = effect.abs()
        total.index_add_(0, groups, effect.to(total.device))
        # Padding counts in neither the mean nor the norm of the activations.
        x = x * self.real.to(x.device)[..., None]
        self.sums[f"sum/{site}"] += x.sum((0, 1)).to(total.device)
        self.sums[f"square/{site}"] += x.square().sum((0, 1)).to(total.device)
        self.folded.add(site)

    def add_losses(self, losses: Float[Tensor, " answer"]) -> None:
        """Note the losses of the batch's answers, in the order of their numbers (two rows each: safe minus unsafe)."""
        signed = losses.unflatten(0, (-1, self.rows_each)) * _signs(self.rows_each, losses.device)
        self.sums["loss"][self.examples.sort().values.cpu()] = signed.sum(1).cpu()
        self.sums["n_positions"] += int(self.real.sum())

    def signs(self) -> Float[Tensor, " answer"] | None:
        """The sign of each answer of the batch in its example's loss, or None where all are +1."""
        if self.rows_each == 1:
            return None
        return _signs(self.rows_each, self.examples.device).repeat(len(self.examples))

    def _add_weights(self, total: Tensor, x: Tensor, gradient: Tensor, real: Tensor) -> None:
        """Add each example's product x' @ gradient over its own positions to `total`."""
        here = total if total.device == x.device else torch.zeros(total.shape, device=x.device)
        if self.fold == "value":
            here.addmm_(x[real].T, gradient[real])
        else:
            # The only memory that a fold needs is taken before anything is added: running out loses nothing.
            product = torch.empty_like(here)
            for start in range(0, len(x), self.rows_each):
                rows = slice(start, start + self.rows_each)
                read, written = x[rows][real[rows]], gradient[rows][real[rows]]
                torch.mm(read.T, written, out=product)
                here += product.square_() if self.fold == "square" else product.abs_()
        if here is not total:
            total += here.to(total.device)

    def _refuse_not_finite(self, site: Site, gradient: Tensor) -> None:
        bad = ~gradient.sum((1, 2)).isfinite()
        if bool(bad.any()):
            example = int(self.examples[int(bad.nonzero()[0]) // self.rows_each])
            raise InputError(
                f"the gradient of example {example} is not finite in layer {site.layer} ({site}): the model overflows "
                "in this dtype; load it in float32 or bfloat16, or leave the example out"
            )


def folded(effect: Float[Tensor, "example unit"], fold: Fold) -> Float[Tensor, "example unit"]:
    """What of each example's effect is added up."""
    if fold == "value":
        return effect
    return effect.square() if fold == "square" else effect.abs()


def _signs(rows_each: int, device: torch.device) -> Tensor:
    return torch.tensor([1.0, -1.0][:rows_each], device=device)
