"""The record of a scoring run, and its file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from jaxtyping import Float
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site, Unit, parse_site
from dean_interp.tensorfile import read_tensors, write_tensors

_FORMAT = "dean_interp.scores.1"
_KINDS = ("values", "activation_mean", "activation_norm")


@dataclass(frozen=True)
class Scores:
    """How much each unit matters to one behaviour: float32, one tensor a site, on the CPU.

    `scores[Site(layer, "neurons")]` is ` d_mlp`: mean over examples of `|sum over positions of activation * gradient|`
    at `hook_post`. `scores[Site(layer, "gate")]` and `"in"` are `(d_model, d_mlp)`, `"out"` is `(d_mlp, d_model)`: mean
    over examples of `|W * dL/dW|`. All in nats (the loss is a mean cross-entropy).
    """

    behaviour: str
    values: Mapping[Site, Float[Tensor, "..."]]
    activation_mean: Mapping[Site, Float[Tensor, " _"]]
    """Mean activation of each neuron over all real positions: what mean ablation puts in its place. Neurons only."""
    activation_norm: Mapping[Site, Float[Tensor, " _"]]
    """Root mean square over the same positions of each neuron's activation, or of what a matrix reads (` d_in`): what
    controls are matched on."""
    loss: Float[Tensor, " example"]
    """Mean cross-entropy over each example's answer tokens, in nats."""
    prompt_hashes: frozenset[str]
    """The prompts that were scored (`Behaviour.prompt_hashes`); nothing with these is ever measured."""
    fingerprint: str
    """Of the model, the examples, the template and the units: equal fingerprints, equal scores."""

    def __getitem__(self, site: Site) -> Float[Tensor, "..."]:
        return self.values[site]

    def __repr__(self) -> str:
        n_units = sum(value.numel() for value in self.values.values())
        kinds = " and ".join(f"{unit}s" for unit in self.units)
        return f"Scores({self.behaviour!r}, {n_units} {kinds} at {len(self.values)} sites, {len(self.loss)} examples)"

    @property
    def units(self) -> tuple[Unit, ...]:
        """The kinds of unit that were scored."""
        return tuple(unit for unit in get_args(Unit) if any(site.unit == unit for site in self.values))

    def of(self, unit: Unit) -> "Scores":
        """The scores of one kind of unit alone. Raises `InputError` where that kind was not scored."""
        if unit not in self.units:
            raise InputError(f"{self.behaviour} was scored for {' and '.join(self.units)}, not for {unit!r}")
        kinds = {
            kind: {site: value for site, value in getattr(self, kind).items() if site.unit == unit} for kind in _KINDS
        }
        return replace(self, **kinds)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {"loss": self.loss}
        for kind in _KINDS:
            tensors |= {f"{kind}/{site}": tensor for site, tensor in getattr(self, kind).items()}
        facts = {
            "behaviour": self.behaviour,
            "fingerprint": self.fingerprint,
            "prompt_hashes": sorted(self.prompt_hashes),
        }
        write_tensors(path, _FORMAT, tensors, facts)


def load_scores(path: str | Path) -> Scores:
    """Scores from their file. Raises `InputError` where it is missing, damaged, or something else."""
    tensors, facts = read_tensors(path, _FORMAT)
    kinds: dict[str, dict[Site, Tensor]] = {kind: {} for kind in _KINDS}
    for name, tensor in tensors.items():
        kind, _, site = name.partition("/")
        if kind in kinds:
            kinds[kind][parse_site(site)] = tensor
    try:
        return Scores(
            facts["behaviour"],
            **{kind: dict(sorted(values.items())) for kind, values in kinds.items()},
            loss=tensors["loss"],
            prompt_hashes=frozenset(facts["prompt_hashes"]),
            fingerprint=facts["fingerprint"],
        )
    except KeyError as error:
        raise InputError(f"{path} is damaged ({error} is missing)") from error
