"""The record of a scoring run, and its file."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.models.sites import Site, parse_site

_FORMAT = "dean_interp.scores.1"


@dataclass(frozen=True)
class Scores:
    """How much each unit matters to one behaviour: float32, one tensor a site, on the CPU.

    `scores[Site(layer, "neurons")]` is ` d_mlp`: mean over examples of `|sum over positions of activation * gradient|`
    at `hook_post`, in nats (the loss is a mean cross-entropy).
    """

    behaviour: str
    values: Mapping[Site, Float[Tensor, "..."]]
    activation_mean: Mapping[Site, Float[Tensor, " d_mlp"]]
    """Mean activation of each neuron over all real positions: what mean ablation puts in its place."""
    activation_norm: Mapping[Site, Float[Tensor, " d_mlp"]]
    """Root mean square activation over the same positions: what controls are matched on."""
    loss: Float[Tensor, " example"]
    """Mean cross-entropy over each example's answer tokens, in nats."""
    prompt_hashes: frozenset[str]
    """The prompts that were scored (`Behaviour.prompt_hashes`); nothing with these is ever measured."""
    fingerprint: str
    """Of the model, the examples, the template and the unit: equal fingerprints, equal scores."""

    def __getitem__(self, site: Site) -> Float[Tensor, "..."]:
        return self.values[site]

    def __repr__(self) -> str:
        n_units = sum(value.numel() for value in self.values.values())
        return f"Scores({self.behaviour!r}, {n_units} units at {len(self.values)} sites, {len(self.loss)} examples)"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; it appears whole or not at all."""
        tensors = {"loss": self.loss}
        for kind in ("values", "activation_mean", "activation_norm"):
            tensors |= {f"{kind}/{site}": tensor.contiguous() for site, tensor in getattr(self, kind).items()}
        metadata = {
            "format": _FORMAT,
            "behaviour": self.behaviour,
            "fingerprint": self.fingerprint,
            "prompt_hashes": json.dumps(sorted(self.prompt_hashes)),
        }
        unfinished = Path(path).with_suffix(".part")
        save_file(tensors, unfinished, metadata)
        unfinished.replace(path)


def load_scores(path: str | Path) -> Scores:
    """Scores from their file. Raises `InputError` where it is missing, cut short, or something else."""
    if not Path(path).is_file():
        raise InputError(f"no scores file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or not a scores file ({error})") from error
    if metadata.get("format") != _FORMAT:
        raise InputError(f"{path} is not a scores file of this version ({_FORMAT}), got {metadata.get('format')}")
    kinds: dict[str, dict[Site, Tensor]] = {"values": {}, "activation_mean": {}, "activation_norm": {}}
    for name, tensor in tensors.items():
        kind, _, site = name.partition("/")
        if kind in kinds:
            kinds[kind][parse_site(site)] = tensor
    ordered = {kind: dict(sorted(values.items())) for kind, values in kinds.items()}
    hashes = frozenset(json.loads(metadata["prompt_hashes"]))
    return Scores(metadata["behaviour"], **ordered, loss=tensors["loss"], prompt_hashes=hashes,
                  fingerprint=metadata["fingerprint"])  # fmt: skip
