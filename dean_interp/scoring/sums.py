"""Running sums over examples: a scoring pass folds every pair of activations and gradients into them."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import home, shape
from dean_interp.models.neurons import effect_of_rows, routed_ids, summed_over_positions
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Batch
from dean_interp.scoring.products import Fold, add_products, folded


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
        self.model, self.sites, self.rows_each, self.groups = model, sites, rows_each, groups
        self.folds: tuple[Fold, ...] = tuple(folds)
        self.sums = {"loss": torch.zeros(len(groups)), "n_positions": torch.zeros((), dtype=torch.int64)}
        for site in sites:
            n_in, n_out = shape(model, site.matrix)
            sizes: dict[str, tuple[int, ...]] = {"square": (n_in,)}
            for fold in self.folds:
                sizes[f"{fold} effect"] = (n_in, n_out) if site.unit == "weight" else (n_in,)
            if site.unit == "neuron":
                sizes |= {"sum": (n_in,), f"{self.folds[0]} effect": (int(groups.max()) + 1, n_in)}
            if site.is_of_experts:
                sizes["slots"] = (site.n_experts,)
            for kind, size in sizes.items():
                self.sums[f"{kind}/{site}"] = torch.zeros(size, device=home(model, site.matrix))
        # Which examples' gradients are finite at which site: looked at after a pass, since looking waits for a GPU.
        self._are_finite: list[tuple[Site, Tensor, Tensor]] = []

    def begin(self, batch: Batch) -> None:
        """Say which batch the next pairs belong to."""
        answers = torch.zeros(len(batch.tokens), dtype=torch.int64, device=batch.answer.device)
        answers[batch.read_row] = batch.answer
        self.examples: Int[Tensor, " example"] = answers[:: self.rows_each] // self.rows_each
        self.batch_groups = self.groups[self.examples.cpu()].to(self.examples.device)
        self.real = batch.real
        # The positions without padding, as one axis, and how many of them each example has.
        self.places = batch.real.flatten().nonzero()[:, 0]
        self.lengths = batch.real.sum(1).unflatten(0, (-1, self.rows_each)).sum(1)
        self.folded: set[Site] = set()

    def add(
        self, site: Site, x: Float[Tensor, "batch pos *slot d_in"], gradient: Float[Tensor, "batch pos *slot d_out"]
    ) -> None:
        """Fold one batch at one site in."""
        self._note_finite(site, gradient)
        if site.unit == "neuron":
            self.fold_neurons(site, x.float(), effect_of_rows(self.model, site, x, gradient))
            return
        totals: dict[Fold, Tensor] = {fold: self.sums[f"{fold} effect/{site}"] for fold in self.folds}
        here: dict[Fold, Tensor] = {fold: _on_device_of(x, total) for fold, total in totals.items()}
        add_products(*self._by_expert(site, here, x, gradient))
        for fold, total in totals.items():
            if here[fold] is not total:
                total += here[fold].to(total.device)
        self._add_read("square", site, x.float().square())
        self._count_slots(site)
        self.folded.add(site)

    def fold_neurons(
        self, site: Site, x: Float[Tensor, "batch pos *slot width"], effect: Float[Tensor, "batch unit"]
    ) -> None:
        """Fold one batch's effects at a site of neurons in, with the activations that they come from."""
        first, *others = self.folds
        total = self.sums[f"{first} effect/{site}"]
        # The rows of an example are one effect, which is folded after they are added.
        effect = effect.unflatten(0, (-1, self.rows_each)).sum(1).to(total.device)
        # Squares are taken at the end: each example is a group of its own, and keeps its signed effect.
        of_groups = effect if first == "square" else folded(effect, first)
        total.index_add_(0, self.batch_groups.to(total.device), of_groups)
        for fold in others:
            self.sums[f"{fold} effect/{site}"] += folded(effect, fold).sum(0)
        self._add_read("sum", site, x)
        self._add_read("square", site, x.square())
        self._count_slots(site)
        self.folded.add(site)

    def add_losses(self, losses: Float[Tensor, " answer"]) -> None:
        """Note the losses of the batch's answers, in the order of their numbers (two rows each: safe minus unsafe).

        Raises `InputError` where the gradient of an example was not finite somewhere.
        """
        self._refuse_not_finite()
        signed = losses.unflatten(0, (-1, self.rows_each)) * _signs(self.rows_each, losses.device)
        self.sums["loss"][self.examples.sort().values.cpu()] = signed.sum(1).cpu()
        self.sums["n_positions"] += len(self.places)

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

    def _by_expert(
        self, site: Site, totals: Mapping[Fold, Tensor], x: Tensor, gradient: Tensor
    ) -> tuple[dict[Fold, Tensor], Tensor, Tensor, Int[Tensor, "expert example"]]:
        """What `add_products` takes: totals by expert, and the places without padding, sorted by expert and example."""
        places = self.places.to(x.device)
        if not site.is_of_experts:
            by_expert: dict[Fold, Tensor] = {fold: total[None] for fold, total in totals.items()}
            read, written = x.flatten(0, 1)[places], gradient.flatten(0, 1)[places]
            return by_expert, read, written, self.lengths[None].to(x.device)
        ids = routed_ids(self.model, site).to(x.device)
        experts = ids.flatten(0, 1)[places].flatten()
        order = experts.argsort(stable=True)
        # Slots stand in the order of the places, and places in that of the examples.
        n_slots, n_examples = ids.shape[2], len(self.lengths)
        place = places[order // n_slots]
        slots, example = place * n_slots + order % n_slots, place // (self.rows_each * ids.shape[1])
        counts = torch.zeros(site.n_experts * n_examples, dtype=torch.int64, device=x.device)
        counts.index_add_(0, experts[order] * n_examples + example, torch.ones_like(example))
        by_expert = {fold: _of_each_expert(site, total) for fold, total in totals.items()}
        read, written = x.flatten(0, 2)[slots], gradient.flatten(0, 2)[slots]
        return by_expert, read, written, counts.unflatten(0, (-1, n_examples))

    def _note_finite(self, site: Site, gradient: Tensor) -> None:
        is_finite = gradient.flatten(1).sum(1, dtype=torch.float32).isfinite()
        self._are_finite.append((site, is_finite.unflatten(0, (-1, self.rows_each)).all(1), self.examples))

    def _refuse_not_finite(self) -> None:
        noted, self._are_finite = self._are_finite, []
        if not noted or bool(torch.stack([is_finite.all().to(noted[0][1]) for _, is_finite, _ in noted]).all()):
            return
        for site, is_finite, examples in noted:
            if not bool(is_finite.all()):
                example = int(examples[int((~is_finite).nonzero()[0])])
                raise InputError(
                    f"the gradient of example {example} is not finite in layer {site.layer} ({site}): the model "
                    "overflows in this dtype; load it in float32 or bfloat16, or leave the example out"
                )


def _on_device_of(x: Tensor, total: Tensor) -> Tensor:
    """What is added to there: the total itself, or zeros where it lies on another device."""
    return total if total.device == x.device else torch.zeros(total.shape, device=x.device)


def _of_each_expert(site: Site, total: Float[Tensor, "d_in d_out"]) -> Float[Tensor, "expert _ _"]:
    """The experts' own parts of a matrix as wide as all of them, a view."""
    if site.part == "experts.out":
        return total.unflatten(0, (site.n_experts, -1))
    return total.unflatten(1, (site.n_experts, -1)).transpose(0, 1)


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
    # Masks and `bincount` would wait for a GPU.
    counted = where.to(ids)[..., None].expand_as(ids)
    counts = torch.zeros(site.n_experts, dtype=ids.dtype, device=ids.device)
    return counts.index_add_(0, ids.flatten(), counted.flatten())


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
