"""The record of a scoring run, and its file."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import pandas as pd
import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.files import read_tensors, write_tensors
from dean_interp.frames import Framed
from dean_interp.models.sites import Site, Size, Unit, WrittenSite, coordinates, parse_site
from dean_interp.scoring.site_fields import PER_SITE, Also, empty_fields, in_order, refuse_damaged
from dean_interp.scoring.top import Top, at_kept, highest, refuse_nan, rounded_up, thinned

_FORMAT = "dean_interp.scores.3"
KEPT_FRACTION = 0.02
"""The fraction of each matrix's weights whose scores a file holds, unless more is asked for."""


@dataclass(frozen=True)
class Scores(Framed):
    """How much each unit matters to one behaviour: float32, one tensor a site, on the CPU.

    `scores[Site(layer, "neurons")]` is ` d_mlp`; a matrix's scores are `(d_in, d_out)`, `(d_mlp, d_model)` for `out`.
    What a score measures, and its unit, depends on the method (`scoring.methods`); gradient methods give nats.
    """

    behaviour: str
    values: Mapping[Site, Float[Tensor, "..."] | Top]
    activation_mean: Mapping[Site, Float[Tensor, " _"]]
    """Mean activation of each neuron over all positions without padding, for mean ablation. Neurons only."""
    activation_norm: Mapping[Site, Float[Tensor, " _"]]
    """Root mean square over the same positions of each neuron's activation, or of what a matrix reads (` d_in`).
    Controls are matched on it. Mean and norm of an expert's neurons are over its own slots, 0 where it had none."""
    groups: Mapping[Site, Float[Tensor, "group d_mlp"]]
    """The neurons' scores on each group of examples (`ScoringConfig.groups`), each a mean over its group; of Fisher
    information each answer's gradient, with its sign. They show how stable a selection is without scoring again.
    Gradient methods only."""
    loss: Float[Tensor, " example"]
    """Mean cross-entropy over each example's answer tokens in nats; empty where a method needs no loss."""
    prompt_hashes: frozenset[str]
    """The prompts that were scored (`Behaviour.prompt_hashes`). No behaviour with one of these is measured."""
    fingerprint: str
    """Hash of everything that the scores depend on: equal fingerprints mean equal scores."""
    facts: Mapping[str, Any]
    """Where they come from: method, target, model, data, template, truncated texts, versions."""
    clusters: Mapping[str, int] = field(default_factory=dict)
    """The topic (or prompt) of each group and its number of examples, in order; empty where examples are spread."""
    slots: Mapping[Site, Float[Tensor, " n_experts"]] = field(default_factory=dict)
    """How many tokens were sent to each routed expert. One that got none is unseen: its scores of 0 say nothing."""
    signed: Mapping[Site, Float[Tensor, "..."]] = field(default_factory=dict)
    """The mean effect of each unit whose score is held, with its sign; empty where it was not asked for, and where the
    scores keep their sign themselves."""
    squared: Mapping[Site, Float[Tensor, "..."]] = field(default_factory=dict)
    """The mean of each such unit's squared effects, for standard errors; empty where it was not asked for."""

    def __getitem__(self, site: Site) -> Float[Tensor, "..."]:
        """All scores of a site. Raises `InputError` where a file kept the highest only."""
        value = self.values[site]
        if isinstance(value, Top):
            n_kept = len(value.values)
            n_units = value.numel()
            raise InputError(
                f"only the top {n_kept} of {n_units} scores of {site} were kept: score again and keep all (keep=1)"
            )
        return value

    def __repr__(self) -> str:
        n_units = sum(value.numel() for value in self.values.values())
        kinds = " and ".join(f"{unit}s" for unit in self.units)
        n_sites = len(self.values)
        method = self.facts["method"]
        return f"Scores({self.behaviour!r}, {n_units} {kinds} at {n_sites} sites, {method})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a unit whose score is held (of weights, what was kept), highest first: layer, part, place, score."""
        tables = []
        for site, value in self.values.items():
            n_units = value.numel()
            indices = value.indices if isinstance(value, Top) else torch.arange(n_units)
            columns = coordinates(site, indices, self.shapes[site])
            scores = self.at(site, indices)
            columns["score"] = scores.numpy()
            tables.append(pd.DataFrame(columns))
        table = pd.concat(tables)
        return table.sort_values("score", key=abs, ascending=False, ignore_index=True)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The kinds of unit that were scored."""
        scored = {site.unit for site in self.values}
        return tuple(unit for unit in get_args(Unit) if unit in scored)

    @property
    def shapes(self) -> dict[Site, tuple[int, ...]]:
        """The shape of every site, whatever was kept of it."""
        return {site: tuple(value.shape) for site, value in self.values.items()}

    def of(self, unit: Unit) -> "Scores":
        """The scores of one kind of unit alone. Raises `InputError` where that kind was not scored."""
        if unit not in self.units:
            scored = " and ".join(self.units)
            raise InputError(f"{self.behaviour} was scored for {scored}, not for {unit!r}")
        fields: dict[str, dict[Site, Any]] = {}
        for name in ("values", *PER_SITE):
            tensors = getattr(self, name)
            fields[name] = {site: tensor for site, tensor in tensors.items() if site.unit == unit}
        return replace(self, **fields)

    def top(self, site: Site, count: int) -> Int[Tensor, " chosen"]:
        """The `count` highest scores of a site by size, as ascending flat indices; ties go to the lower index.

        Raises `InputError` where a score is NaN, or a file kept fewer.
        """
        value = self.values[site]
        if not isinstance(value, Top):
            refuse_nan(self.behaviour, site, value)
            return highest(value.flatten().abs(), count)
        n_kept = len(value.indices)
        if count > n_kept:
            # The smallest float fraction that keeps so many.
            needed = rounded_up(count / value.numel() * (1 + 1e-9))
            raise InputError(
                f"{count} weights of {site} were asked for; the scores of {self.behaviour} hold its top "
                f"{n_kept}: score again and keep at least {needed} (keep=...)"
            )
        return value.indices[highest(value.values.abs(), count)]

    def n_kept(self, site: Site) -> int:
        """How many scores of a site there are: all, or those that were kept."""
        value = self.values[site]
        if isinstance(value, Top):
            return len(value.indices)
        return value.numel()

    def threshold(self, site: Site) -> float:
        """No score of the site that was not kept is larger than this."""
        value = self.values[site]
        are_all_kept = self.n_kept(site) == value.numel()
        if not isinstance(value, Top) or are_all_kept:
            return 0.0
        return value.threshold

    def at(self, site: Site, indices: Int[Tensor, " unit"]) -> Float[Tensor, " unit"]:
        """The scores of some units of a site. Raises `InputError` where one of them was not kept."""
        value = self.values[site]
        scores = value.values if isinstance(value, Top) else value
        places = self._kept_places(site, indices)
        return scores.flatten()[places]

    def signed_at(self, site: Site, indices: Int[Tensor, " unit"]) -> Float[Tensor, " unit"]:
        """The signed means of some units of a site. Raises `InputError` as `at` and `signed_means`."""
        means = self.signed_means(site)
        places = self._kept_places(site, indices)
        return means.flatten()[places]

    def _kept_places(self, site: Site, indices: Int[Tensor, " unit"]) -> Int[Tensor, " unit"]:
        """Where the scores of some units stand among those that were kept."""
        value = self.values[site]
        if not isinstance(value, Top):
            return indices
        are_kept = torch.isin(indices, value.indices)
        if not bool(are_kept.all()):
            raise InputError(f"not all of these {len(indices)} scores of {site} were kept: score again, keep=1")
        return torch.searchsorted(value.indices, indices)

    def signed_means(self, site: Site) -> Float[Tensor, "..."]:
        """The mean effect of each unit of a site whose score is held, with its sign.

        Raises `InputError` where no sign was kept.
        """
        if site in self.signed:
            return self.signed[site]
        if not self.facts.get("signed"):
            raise InputError(
                f"the scores of {self.behaviour} have no sign at {site}: score with ScoringConfig(signed=True), or "
                "keep the signed means beside them (also=('signed',))"
            )
        value = self.values[site]
        return value.values if isinstance(value, Top) else value

    def kept(self, fraction: float = KEPT_FRACTION) -> "Scores":
        """The same scores with no more than the top `fraction` of each matrix. Those of neurons stay whole."""
        refuse_keep(fraction)
        values = {}
        for site, value in self.values.items():
            values[site] = thinned(self.behaviour, site, value, fraction)
        # Other means of the same effects, and those of groups, are kept for the same units.
        further: dict[str, dict[Site, Tensor]] = {name: {} for name in (*get_args(Also), "groups")}
        for name, kept in further.items():
            for site, tensor in getattr(self, name).items():
                kept[site] = at_kept(tensor, self.values[site], values[site])
        return replace(self, values=values, **further)

    def save(self, path: str | Path, *, keep: float = KEPT_FRACTION) -> None:
        """Write a safetensors file, whole or not at all, with the top fraction `keep` of each matrix's weights."""
        kept = self.kept(keep)
        # A tensor's name is the field that it belongs to and its site: "values/L3.neurons".
        tensors = {"loss": self.loss}
        tops = {}
        for site, value in kept.values.items():
            if isinstance(value, Top):
                # All experts of a layer together may have more weights than 32 bits count.
                is_short = value.numel() <= torch.iinfo(torch.int32).max
                tensors[f"top/{site}"] = value.indices.to(torch.int32 if is_short else torch.int64)
                tensors[f"values/{site}"] = value.values
                tops[str(site)] = {"shape": value.shape, "threshold": value.threshold}
            else:
                tensors[f"values/{site}"] = value
        for name in PER_SITE:
            for site, tensor in getattr(kept, name).items():
                tensors[f"{name}/{site}"] = tensor
        facts = {
            "behaviour": self.behaviour,
            "fingerprint": self.fingerprint,
            "prompt_hashes": sorted(self.prompt_hashes),
            "clusters": list(self.clusters.items()),
            "tops": tops,
            "facts": dict(self.facts),
        }
        write_tensors(path, _FORMAT, tensors, facts)


@dataclass(frozen=True)
class _WrittenTop:
    shape: tuple[Size, Size]
    threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class _ScoresFile:
    behaviour: str
    fingerprint: str
    prompt_hashes: frozenset[str]
    clusters: list[tuple[str, Size]]
    tops: dict[WrittenSite, _WrittenTop]
    facts: dict[str, Any]


def load_scores(path: str | Path) -> Scores:
    """Scores from their file. Raises `InputError` where it is missing, damaged, or something else."""
    tensors, written = read_tensors(path, _FORMAT, _ScoresFile)
    fields = empty_fields()
    try:
        for tensor_name, tensor in tensors.items():
            name, _, site = tensor_name.partition("/")
            if name in fields:
                fields[name][parse_site(site)] = tensor
        for site, top in written.tops.items():
            values = tensors[f"values/{site}"]
            indices = tensors[f"top/{site}"].long()
            fields["values"][site] = Top(top.shape, indices, values, top.threshold)
        loss = tensors["loss"]
        # Scores show by which method they came.
        _ = written.facts["method"]
    except (KeyError, InputError) as error:
        raise InputError(f"{path} is damaged ({error} is missing or no site)") from error
    refuse_damaged(path, fields, loss)
    return Scores(
        **in_order(fields),
        behaviour=written.behaviour,
        loss=loss,
        clusters=dict(written.clusters),
        prompt_hashes=written.prompt_hashes,
        fingerprint=written.fingerprint,
        facts=written.facts,
    )


def refuse_keep(fraction: float) -> None:
    """Raise `InputError` where the fraction to keep is not in (0, 1]."""
    if not 0 < fraction <= 1:
        raise InputError(f"keep must be in (0, 1], got {fraction}")
