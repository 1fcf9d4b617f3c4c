"""The units of a change as a table, to switch them on and off: by layer, by behaviour, or one by one.

A unit belongs to the behaviour for which it has the best rank in its site, by scores that are given.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.editing.edit_at_dose import AnyEdit, as_hooks
from dean_interp.editing.values import Given, Multiply, Zero
from dean_interp.errors import InputError
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.neuron_names import name_of
from dean_interp.models.own_matrices import entries
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores, Top, highest
from dean_interp.selection.selection import Selection

MOST_LISTED = 400
"""Most units that have a row of their own."""


@dataclass(frozen=True)
class ListedUnit:
    """A unit of the change that has a row of its own."""

    name: str
    site: Site
    unit: int
    """Its flat index at the site."""
    change: float
    """At dose 1: of a neuron its gate minus 1, of a weight its new value minus its old one."""
    behaviour: str
    """The behaviour that it belongs to; empty without scores."""
    ranks: Mapping[str, int | None]
    """Its rank in its site for each behaviour, 1 for the highest; None where the file of scores kept no such score."""


@dataclass(frozen=True)
class Switches:
    """What is switched off. A unit is on where neither it, nor its layer, nor its behaviour is off."""

    layers: frozenset[int] = frozenset()
    behaviours: frozenset[str] = frozenset()
    units: frozenset[str] = frozenset()
    """Names of listed units."""


@dataclass(frozen=True)
class UnitTable:
    """All units of a change; the largest changes of each layer have rows."""

    selection: Selection
    listed: tuple[ListedUnit, ...]
    """By layer, the largest change first."""
    n_by_layer: Mapping[int, int]
    n_by_behaviour: Mapping[str, int]
    owners: Mapping[Site, Int[Tensor, " unit"]] = field(repr=False)
    """The number of the behaviour that each unit belongs to; empty without scores."""

    def on(self, switches: Switches) -> Selection:
        """The units that are on. Raises `InputError` where a switch names nothing of the change."""
        self._refuse_unknown(switches)
        off = {unit.name: unit for unit in self.listed if unit.name in switches.units}
        names = list(self.n_by_behaviour)
        numbers = torch.tensor([names.index(name) for name in switches.behaviours], dtype=torch.int64)
        units = {}
        for site, changed in self.selection.units.items():
            is_on = torch.full((len(changed),), site.layer not in switches.layers)
            if site in self.owners:
                is_on &= ~torch.isin(self.owners[site], numbers)
            single = [unit.unit for unit in off.values() if unit.site == site]
            is_on &= ~torch.isin(changed, torch.tensor(single, dtype=torch.int64))
            units[site] = changed[is_on]
        return replace(self.selection, units=units)

    def _refuse_unknown(self, switches: Switches) -> None:
        known = {
            "layer": (switches.layers, self.n_by_layer),
            "behaviour": (switches.behaviours, self.n_by_behaviour),
            "unit": (switches.units, {unit.name for unit in self.listed}),
        }
        for kind, (off, there) in known.items():
            unknown = sorted(name for name in off if name not in there)
            if unknown:
                raise InputError(f"the change lists no {kind} {unknown[0]!r}, so it cannot be switched off")


def unit_table(model: HookedModel, change: AnyEdit, scores: Sequence[Scores] = ()) -> UnitTable:
    """The units of a change.

    Args:
        model: its base.
        change: gates, an edit, or a selection.
        scores: of each behaviour, to tell which unit belongs to which behaviour.

    Raises:
        InputError: scores of other sites, or two of one behaviour.
    """
    selection, value = as_hooks(change)
    behaviours = [each.behaviour for each in scores]
    if len({*behaviours}) < len(behaviours):
        raise InputError(f"give one set of scores a behaviour, got scores of {', '.join(behaviours)}")
    sites = [site for site, units in selection.units.items() if len(units)]
    # A unit belongs to the behaviour for which its rank is best.
    ranks: dict[Site, Tensor] = {}
    owners: dict[Site, Tensor] = {}
    if scores:
        for site in sites:
            ranks[site] = _ranks_at(scores, site, selection)
            owners[site] = ranks[site].argmin(0)
    # Every layer may list as many units as the others: those that change most.
    layers = sorted({site.layer for site in sites})
    n_per_layer = max(1, MOST_LISTED // len(layers))
    listed: list[ListedUnit] = []
    for layer in layers:
        rows = []
        for site in sites:
            if site.layer == layer:
                changes = _changes(model, selection, value, site)
                rows += _rows(selection, site, changes, n_per_layer, ranks.get(site), scores)
        rows.sort(key=lambda row: -abs(row.change))
        listed += rows[:n_per_layer]
    n_by_behaviour: dict[str, int] = {}
    for number, name in enumerate(behaviours):
        n_by_behaviour[name] = sum(int((of_site == number).sum()) for of_site in owners.values())
    return UnitTable(
        selection=selection,
        listed=tuple(listed),
        n_by_layer={layer: n_units for layer, n_units in selection.layer_counts().items() if n_units},
        n_by_behaviour=n_by_behaviour,
        owners=owners,
    )


def _rows(
    selection: Selection,
    site: Site,
    changes: Float[Tensor, " unit"],
    n_rows: int,
    ranks: Int[Tensor, "behaviour unit"] | None,
    scores: Sequence[Scores],
) -> list[ListedUnit]:
    """The rows of the units of a site that change most."""
    rows = []
    for place in highest(changes.abs(), min(n_rows, len(changes))).tolist():
        unit = int(selection.units[site][place])
        owner = ""
        shown_ranks: dict[str, int | None] = {}
        if ranks is not None:
            ranks_of_unit = ranks[:, place].tolist()
            owner = scores[ranks_of_unit.index(min(ranks_of_unit))].behaviour
            for of_behaviour, rank in zip(scores, ranks_of_unit, strict=True):
                was_kept = rank <= of_behaviour.n_kept(site)
                shown_ranks[of_behaviour.behaviour] = rank if was_kept else None
        row = ListedUnit(
            name=_name(selection, site, unit),
            site=site,
            unit=unit,
            change=float(changes[place]),
            behaviour=owner,
            ranks=shown_ranks,
        )
        rows.append(row)
    return rows


def _name(selection: Selection, site: Site, unit: int) -> str:
    shape = selection.shapes[site]
    if site.unit == "neuron":
        return str(name_of((site, unit), shape[0]))
    row, column = divmod(unit, shape[1])
    return f"{site}[{row}, {column}]"


def _changes(
    model: HookedModel, selection: Selection, value: Multiply | Given | Zero, site: Site
) -> Float[Tensor, " unit"]:
    """How much each changed unit of a site changes at dose 1."""
    units = selection.units[site]
    match value:
        case Multiply(gates):
            return gates.multipliers[site][units] - 1
        case Given(weights):
            return weights[site].float() - entries(model, site, units).float().cpu()
        case Zero():
            return -entries(model, site, units).float().cpu()


def _ranks_at(scores: Sequence[Scores], site: Site, selection: Selection) -> Int[Tensor, "behaviour unit"]:
    """The ranks of a site's changed units by size of score; one more than were kept where a score was not kept."""
    ranks = []
    for each in scores:
        if each.shapes.get(site) != selection.shapes[site]:
            raise InputError(f"the scores of {each.behaviour} hold no {site} of the shape that the change has")
        value = each.values[site]
        kept = value.indices if isinstance(value, Top) else torch.arange(value.numel())
        best_first = kept[each.at(site, kept).abs().argsort(descending=True, stable=True)]
        rank = torch.full((value.numel(),), len(kept) + 1)
        rank[best_first] = torch.arange(1, len(kept) + 1)
        ranks.append(rank[selection.units[site]])
    return torch.stack(ranks)
