"""Running sums over examples: a scoring pass folds every pair of activations and gradients into them."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.experts import by_expert
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.neurons import effect_of_rows, routed_ids, summed_over_positions
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.scoring.products import Fold, add_products


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
        self.model, self.sites, self.rows_each, self.groups = model, sites, rows_each, groups
        self.fold: Fold = fold
        self.sums = {"loss": torch.zeros(len(groups)), "n_positions": torch.zeros((), dtype=torch.int64)}
        for site in sites:
            n_in, n_out = shape(model, site.matrix)
            sizes: dict[str, tuple[int, ...]] = {"square": (n_in,), "effect": (n_in, n_out)}
            if site.unit == "neuron":
                sizes |= {"sum": (n_in,), "effect": (int(groups.max()) + 1, n_in)}
            if site.is_of_experts:
                sizes["slots"] = (site.n_experts,)
            for kind, size in sizes.items():
                self.sums[f"{kind}/{site}"] = torch.zeros(size, device=home(model, site.matrix))

    def begin(self, batch: Batch) -> None:
        """Say which batch the next pairs belong to."""
        answers = torch.zeros(len(batch.tokens), dtype=torch.int64, device=batch.answer.device)
        answers[batch.read_row] = batch.answer
        self.examples: Int[Tensor, " example"] = answers[:: self.rows_each] // self.rows_each
        self.real = batch.real
        self.folded: set[Site] = set()

    def add(
        self, site: Site, x: Float[Tensor, "batch pos *slot d_in"], gradient: Float[Tensor, "batch pos *slot d_out"]
    ) -> None:
        """Fold one batch at one site in. Raises `InputError` where an example's gradient is not finite."""
        self._refuse_not_finite(site, gradient)
        if site.unit == "neuron":
            self.fold_neurons(site, x.float(), effect_of_rows(self.model, site, x, gradient))
            return
        total = self.sums[f"effect/{site}"]
        here = total if total.device == x.device else torch.zeros(total.shape, device=x.device)
        if site.is_of_experts:
            self._add_expert_weights(here, site, x, gradient)
        else:
            self._add_weights(here, x, gradient)
        if here is not total:
            total += here.to(total.device)
        self._add_read("square", site, x.float().square())
        self._count_slots(site)
        self.folded.add(site)

    def fold_neurons(
        self, site: Site, x: Float[Tensor, "batch pos *slot width"], effect: Float[Tensor, "batch unit"]
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
        self._add_read("sum", site, x)
        self._add_read("square", site, x.square())
        self._count_slots(site)
        self.folded.add(site)

    def add_losses(self, losses: Float[Tensor, " answer"]) -> None:
        """Note the losses of the batch's answers, in the order of their numbers (two rows each: safe minus unsafe)."""
        signed = losses.unflatten(0, (-1, self.rows_each)) * _signs(self.rows_each, losses.device)
        self.sums["loss"][self.examples.sort().values.cpu()] = signed.sum(1).cpu()
        self.sums["n_positions"] += int(self.real.sum())

    def n_read(self, site: Site) -> int | Float[Tensor, " unit"]:
        """How often what a site's units read was added up: at every position, or at an expert's slots (at least 1)."""
        return n_read(site, self.sums, int(self.sums["n_positions"]))

    def signs(self) -> Float[Tensor, " answer"] | None:
        """The sign of each answer of the batch in its example's loss, or None where all are +1."""
        if self.rows_each == 1:
            return None
        return _signs(self.rows_each, self.examples.device).repeat(len(self.examples))

    def _add_read(self, kind: str, site: Site, values: Tensor) -> None:
        """Add something of what a site's units read, without padding."""
        total = self.sums[f"{kind}/{site}"]
        total += summed_where(self.model, site, values, self.real).to(total.device)

    def _count_slots(self, site: Site) -> None:
        if site.is_of_experts:
            total = self.sums[f"slots/{site}"]
            total += slots_where(self.model, site, self.real).to(total)

    def _add_expert_weights(self, here: Tensor, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Add each example's product over the slots of each expert to the expert's own part."""
        ids = routed_ids(self.model, site).to(x.device)
        ids = ids.masked_fill(~self.real.to(x.device)[..., None], -1)
        slots_an_example = self.rows_each * ids[0].numel()
        read, written = x.flatten(0, 2), gradient.flatten(0, 2)
        by_expert_first = here.unflatten(0 if site.part == "experts.out" else 1, (site.n_experts, -1))
        for expert, slots in by_expert(ids):
            if expert >= 0:
                own = by_expert_first[expert] if site.part == "experts.out" else by_expert_first[:, expert]
                # An expert's slots stand in the order of the examples.
                lengths = (slots // slots_an_example).bincount(minlength=len(self.examples))
                add_products(own, read[slots], written[slots], lengths.tolist(), self.fold)

    def _add_weights(self, here: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Add each example's product over its own positions, without padding."""
        real = self.real.to(x.device)
        lengths = real.flatten(1).sum(1).unflatten(0, (-1, self.rows_each)).sum(1)
        add_products(here, x[real], gradient[real], lengths.tolist(), self.fold)

    def _refuse_not_finite(self, site: Site, gradient: Tensor) -> None:
        bad = ~gradient.flatten(1).sum(1, dtype=torch.float32).isfinite()
        if bool(bad.any()):
            example = int(self.examples[int(bad.nonzero()[0]) // self.rows_each])
            raise InputError(
                f"the gradient of example {example} is not finite in layer {site.layer} ({site}): the model overflows "
                "in this dtype; load it in float32 or bfloat16, or leave the example out"
            )


def summed_where(
    model: HookedModel, site: Site, values: Float[Tensor, "batch pos *slot width"], where: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " unit"]:
    """The sum over some positions of something of what a site's units read.

    Experts' `gate` and `in` read the same numbers in every slot of a position; each neuron is read where its expert is.
    """
    where = where.to(values.device)
    values = values * where.reshape(*where.shape, *[1] * (values.dim() - 2))
    if site.part in ("experts", "experts.out"):
        return summed_over_positions(model, site, values).sum(0)
    return values.sum((0, 1)) if not site.is_of_experts else values.flatten(0, 2).sum(0)


def slots_where(model: HookedModel, site: Site, where: Bool[Tensor, "batch pos"]) -> Int[Tensor, " n_experts"]:
    """How many slots each expert of a site got at some positions."""
    ids = routed_ids(model, site)
    return ids[where.to(ids.device)].flatten().bincount(minlength=site.n_experts)


def n_read(site: Site, sums: Mapping[str, Tensor], n_positions: int) -> int | Float[Tensor, " unit"]:
    """How often what a site's units read was added up: at every position, or at the slots of an expert (at least 1).

    Args:
        sums: holds `slots/` and `square/` of a site of experts.
    """
    if not site.is_of_experts:
        return n_positions
    slots = sums[f"slots/{site}"]
    if site.part in ("experts", "experts.out"):
        return slots.clamp(min=1).repeat_interleave(len(sums[f"square/{site}"]) // site.n_experts)
    return int(slots.sum())


def _signs(rows_each: int, device: torch.device) -> Tensor:
    return torch.tensor([1.0, -1.0][:rows_each], device=device)
