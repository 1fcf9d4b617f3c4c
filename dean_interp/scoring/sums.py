"""Running sums over examples: a scoring pass folds every pair of activations and gradients into them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.neurons import effect_of_rows, routed_ids
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.scoring.product_places import ProductPlaces, dense_places, expert_places
from dean_interp.scoring.products import Fold, add_products, folded
from dean_interp.scoring.reads import n_read, slots_where, summed_where


class Sums:
    """Running sums of some sites, in float32, on the device of each site's matrix (`matrices.home`).

    Per neuron: activation * gradient by group of examples, activation, squared activation. Per weight: x' @ gradient,
    and the square of what its matrix reads. Of an example's effect the value, size or square is added up, or several of
    them (`folds`). Neurons have groups for the first fold alone; where that is the square, each example is a group,
    whose effect is kept with its sign.
    Hand every batch to `begin` before its pass, and its losses to `add_losses` after. In between nothing waits for a
    GPU.
    """

    def __init__(
        self,
        model: HookedModel,
        sites: Sequence[Site],
        *,
        groups: Int[Tensor, " example"],
        rows_each: int,
        folds: Sequence[Fold],
    ) -> None:
        """Begin with zeros.

        Args:
            groups: the group of each example, from 0.
            rows_each: so many rows of a batch that follow each other make one example (2: a safe and an unsafe answer).
            folds: what of an example's effect is added up, each into sums of its own.
        """
        self.model = model
        self.sites = sites
        self.groups = groups
        self.rows_each = rows_each
        self.folds: tuple[Fold, ...] = tuple(folds)
        self.sums = {
            "loss": torch.zeros(len(groups)),
            "n_positions": torch.zeros((), dtype=torch.int64),
        }
        for site in sites:
            device = home(model, site.matrix)
            for kind, size in self._sizes(site).items():
                self.sums[f"{kind}/{site}"] = torch.zeros(size, device=device)
        # Looked at after a pass, since looking waits for a GPU.
        self._finite_checks: list[_FiniteCheck] = []

    def _sizes(self, site: Site) -> dict[str, tuple[int, ...]]:
        """The size of each sum of a site, by its kind."""
        n_in, n_out = shape(self.model, site.matrix)
        size_of_effect = (n_in, n_out) if site.unit == "weight" else (n_in,)
        sizes: dict[str, tuple[int, ...]] = {"square": (n_in,)}
        for fold in self.folds:
            sizes[f"{fold} effect"] = size_of_effect
        if site.unit == "neuron":
            n_groups = int(self.groups.max()) + 1
            sizes["sum"] = (n_in,)
            sizes[f"{self.folds[0]} effect"] = (n_groups, n_in)
        if site.is_of_experts:
            sizes["slots"] = (site.n_experts,)
        return sizes

    def begin(self, batch: Batch) -> None:
        """Say which batch the next pairs belong to."""
        # The answers' numbers by row give those of the examples, of which each has `rows_each` answers.
        n_rows = len(batch.tokens)
        answers = torch.zeros(n_rows, dtype=torch.int64, device=batch.answer.device)
        answers[batch.read_row] = batch.answer
        first_answers = answers[:: self.rows_each]
        self.examples: Int[Tensor, " example"] = first_answers // self.rows_each
        groups = self.groups[self.examples.cpu()]
        self.batch_groups = groups.to(self.examples.device)
        # The positions without padding, as one axis, and how many of them each example has.
        self.real = batch.real
        self.places = batch.real.flatten().nonzero()[:, 0]
        row_lengths = batch.real.sum(1)
        self.lengths = self._by_example(row_lengths).sum(1)
        self.folded: set[Site] = set()

    def add(
        self,
        site: Site,
        x: Float[Tensor, "batch pos *slot d_in"],
        gradient: Float[Tensor, "batch pos *slot d_out"],
    ) -> None:
        """Fold one batch at one site in."""
        self.note_finite(site, gradient)
        if site.unit == "neuron":
            effect = effect_of_rows(self.model, site, x, gradient)
            self.fold_neurons(site, x.float(), effect)
        else:
            self._fold_weights(site, x, gradient)

    def fold_neurons(
        self,
        site: Site,
        x: Float[Tensor, "batch pos *slot width"],
        effect: Float[Tensor, "batch unit"],
    ) -> None:
        """Fold one batch's effects at a site of neurons in, with the activations that they come from."""
        first, *others = self.folds
        total = self.sums[f"{first} effect/{site}"]
        # The rows of an example are one effect, which is folded after they are added.
        by_example = self._by_example(effect)
        effect = by_example.sum(1).to(total.device)
        # Squares are taken at the end: each example is a group of its own, and keeps its signed effect.
        of_groups = effect if first == "square" else folded(effect, first)
        batch_groups = self.batch_groups.to(total.device)
        # All memory is taken before anything is added: running out loses nothing, and adds nothing twice.
        added = self._reads(site, {"sum": x, "square": x.square()})
        for fold in others:
            added[f"{fold} effect/{site}"] = folded(effect, fold).sum(0)
        total.index_add_(0, batch_groups, of_groups)
        self._add(added)
        self.folded.add(site)

    def _fold_weights(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Fold one batch at a matrix in."""
        # The memory for what is read is taken before anything is added.
        added = self._reads(site, {"square": x.float().square()})
        self._add_weight_effects(site, x, gradient)
        self._add(added)
        self.folded.add(site)

    def _add_weight_effects(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Add the products of each example, folded, to the totals of a matrix."""
        # Products are added up where they are made: in the totals, or in zeros where those lie on another device.
        added: dict[Fold, Tensor] = {}
        by_expert: dict[Fold, Tensor] = {}
        for fold in self.folds:
            total = self.sums[f"{fold} effect/{site}"]
            is_here = total.device == x.device
            added[fold] = total if is_here else torch.zeros(total.shape, device=x.device)
            by_expert[fold] = _by_expert(site, added[fold])
        places = self._product_places(site, x, gradient)
        add_products(by_expert, places.read, places.gradient, places.counts)
        for fold in self.folds:
            total = self.sums[f"{fold} effect/{site}"]
            if added[fold] is not total:
                total += added[fold].to(total.device)

    def _product_places(self, site: Site, x: Tensor, gradient: Tensor) -> ProductPlaces:
        """What a matrix reads and the gradient of what it writes, without padding, in the order of `add_products`."""
        places = self.places.to(x.device)
        lengths = self.lengths.to(x.device)
        if not site.is_of_experts:
            return dense_places(x, gradient, places=places, lengths=lengths)
        return expert_places(
            x,
            gradient,
            places=places,
            ids=routed_ids(self.model, site).to(x.device),
            n_experts=site.n_experts,
            n_examples=len(lengths),
            rows_each=self.rows_each,
        )

    def add_losses(self, losses: Float[Tensor, " answer"]) -> None:
        """Note the losses of the batch's answers, in the order of their numbers (two rows each: safe minus unsafe).

        Raises `InputError` where the gradient of an example was not finite somewhere.
        """
        self._refuse_not_finite()
        signs = _signs(self.rows_each, losses.device)
        signed = self._by_example(losses) * signs
        examples = self.examples.sort().values.cpu()
        self.sums["loss"][examples] = signed.sum(1).cpu()
        self.sums["n_positions"] += len(self.places)

    def n_read(self, site: Site) -> int | Float[Tensor, " unit"]:
        """How often what a site's units read was added up: at every position, or at an expert's slots (at least 1)."""
        return n_read(site, self.sums, int(self.sums["n_positions"]))

    def signs(self) -> Float[Tensor, " answer"] | None:
        """The sign of each answer of the batch in its example's loss, or None where all are +1."""
        if self.rows_each == 1:
            return None
        signs = _signs(self.rows_each, self.examples.device)
        return signs.repeat(len(self.examples))

    def _by_example(self, by_row: Tensor) -> Tensor:
        """What each row has, with an axis for examples and one for an example's rows."""
        return by_row.unflatten(0, (-1, self.rows_each))

    def _reads(self, site: Site, of_reads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the sums of what a site's units read, without padding, and to the slots of experts."""
        added = {}
        for kind, values in of_reads.items():
            added[f"{kind}/{site}"] = summed_where(self.model, site, values, self.real)
        if site.is_of_experts:
            added[f"slots/{site}"] = slots_where(self.model, site, self.real)
        return {name: value.to(self.sums[name]) for name, value in added.items()}

    def _add(self, added: Mapping[str, Tensor]) -> None:
        """Add to some sums, by their names."""
        for name, value in added.items():
            self.sums[name] += value

    def note_finite(self, site: Site, gradient: Tensor) -> None:
        """Note which examples have a finite gradient at a site; `add_losses` looks at it."""
        row_sums = gradient.flatten(1).sum(1, dtype=torch.float32)
        of_examples = self._by_example(row_sums.isfinite()).all(1)
        self._finite_checks.append(_FiniteCheck(site, of_examples, self.examples))

    def _refuse_not_finite(self) -> None:
        """Raise `InputError` with the first example whose gradient is not finite at a site that was noted."""
        checks = self._finite_checks
        self._finite_checks = []
        if not checks:
            return
        # All sites are looked at in one go, which waits for a GPU once.
        device = checks[0].is_finite.device
        are_finite = torch.stack([check.is_finite.all().to(device) for check in checks])
        if bool(are_finite.all()):
            return
        for check in checks:
            if not bool(check.is_finite.all()):
                raise check.error()


@dataclass(frozen=True)
class _FiniteCheck:
    """Which examples of a batch have a finite gradient at a site."""

    site: Site
    is_finite: Bool[Tensor, " example"]
    examples: Int[Tensor, " example"]

    def error(self) -> InputError:
        """What to say of the first example whose gradient is not finite."""
        place = int((~self.is_finite).nonzero()[0])
        example = int(self.examples[place])
        return InputError(
            f"the gradient of example {example} is not finite in layer {self.site.layer} ({self.site}): the model "
            "overflows in this dtype; load it in float32 or bfloat16, or leave the example out"
        )


def _by_expert(site: Site, total: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "expert _ _"]:
    """The experts' own parts of a matrix as wide as all of them, a view; a dense matrix is one expert."""
    if not site.is_of_experts:
        return total[None]
    if site.part == "experts.out":
        return total.unflatten(0, (site.n_experts, -1))
    by_column = total.unflatten(1, (site.n_experts, -1))
    return by_column.transpose(0, 1)


def _signs(rows_each: int, device: torch.device) -> Float[Tensor, " row"]:
    """The sign of each row of an example in its loss: that of a safe answer, then that of an unsafe one."""
    return torch.tensor([1.0, -1.0][:rows_each], device=device)
