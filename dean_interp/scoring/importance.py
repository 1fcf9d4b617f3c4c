"""Importance of every unit to a behaviour, in one pass over its examples (arXiv 2410.16672, section 4, equation 4).

The paper scores a weight by `E |W * dL/dW|`, the expectation over examples. For a neuron the same first-order question,
how much the loss moves when it is silenced, is answered by its activation times its gradient:
`E |sum over positions of a * dL/da|`.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel, model_fingerprint, native_tokenizer, refuse_not_finite
from dean_interp.models.loss import batched
from dean_interp.models.matrices import weight, weight_sites
from dean_interp.models.memory import scored_prompts
from dean_interp.models.sites import Site, Unit, neuron_sites
from dean_interp.models.tokens import Template, collate, encode, paths
from dean_interp.scoring.capture import check_hook_gradients, stream_gradients
from dean_interp.scoring.scores import Scores
from dean_interp.unfinished import Unfinished


def importance(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    template: Template = "chat",
    batch_tokens: int = 2048,
    unfinished: Path | None = None,
) -> Scores:
    """Score every unit of the model for one behaviour.

    Args:
        model: from `load_model`, or any `TransformerBridge` or `HookedTransformer`.
        behaviour: the examples; the answer named by `behaviour.response` is the one whose loss is taken.
        unit: `neuron` (one index of `d_mlp`), `weight` (one entry of an MLP matrix, the paper's unit), or both in one
            pass: `("neuron", "weight")`. Weights take one float32 accumulator a weight.
        template: how prompt and answer become tokens (`models.tokens.encode`).
        batch_tokens: padded tokens a batch holds at most; memory grows with it, scores do not depend on it.
        unfinished: a file for what the finished batches left. A call that was killed goes on from there when it is
            made again; delete the file once the scores are saved.

    Raises:
        InputError: an unknown unit or template, a text longer than the model's context, weights, loss or scores not
            finite, for weights a model whose weights were processed (folded LayerNorm, centred).
    """
    units = _units(unit)
    sites = (neuron_sites(model) if "neuron" in units else []) + (weight_sites(model) if "weight" in units else [])
    refuse_not_finite(model)
    tokenizer = native_tokenizer(model)
    encoded = [
        encode(tokenizer, prompt, [response], template=template, n_ctx=model.cfg.n_ctx)
        for prompt, response in zip(behaviour.prompts, behaviour.responses, strict=True)
    ]
    rows = paths(encoded)
    middle = [site for site in sites if site.layer == model.cfg.n_layers // 2]
    check_hook_gradients(model, collate(rows[:1], device=model.cfg.device), middle)
    fingerprint = scores_fingerprint(model, behaviour, unit=units, template=template)
    moments = Moments(model, sites, n_examples=len(encoded))
    saved = Unfinished(unfinished, f"{fingerprint} {batch_tokens}") if unfinished else None
    for batch in batched(
        model,
        rows,
        batch_tokens=batch_tokens,
        label=f"scoring {behaviour.name}",
        leave=True,
        unfinished=saved,
        sums=moments.sums,
    ):
        moments.real = batch.real
        losses = stream_gradients(model, batch, sites, moments.add)
        moments.add_losses(torch.unique(batch.answer), losses)
    scores = moments.scores(behaviour, fingerprint)
    scored_prompts(model).update(behaviour.prompt_hashes)
    return scores


def scores_fingerprint(
    model: HookedModel, behaviour: Behaviour, *, unit: Unit | Sequence[Unit], template: Template
) -> str:
    """What scores depend on, hashed: model, examples, template, units."""
    parts = [model_fingerprint(model), behaviour.fingerprint, template, *_units(unit)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def _units(unit: Unit | Sequence[Unit]) -> tuple[Unit, ...]:
    given = {unit} if isinstance(unit, str) else set(unit)
    known = get_args(Unit)
    if not given or not given <= set(known):
        raise InputError(f"unit must be 'neuron', 'weight' or both, got {unit!r}")
    return tuple(one for one in known if one in given)


class Moments:
    """Running sums over examples, float32, on the device of each site.

    Per neuron: |activation * gradient|, activation, squared activation. Per weight: |x' @ gradient|, and the square of
    what its matrix reads. Set `real` (which positions are not padding) before each batch.
    """

    def __init__(self, model: HookedModel, sites: Sequence[Site], *, n_examples: int) -> None:
        self._model, self._sites = model, sites
        self.real = torch.zeros(0, 0, dtype=torch.bool)
        self.sums = {"loss": torch.zeros(n_examples), "n_positions": torch.zeros((), dtype=torch.int64)}
        for site in sites:
            matrix = weight(model, site if site.unit == "weight" else Site(site.layer, "out"))
            shape = matrix.shape if site.unit == "weight" else matrix.shape[:1]
            kinds = {"effect": shape, "square": shape[:1]} | ({"sum": shape} if site.unit == "neuron" else {})
            for kind, size in kinds.items():
                self.sums[f"{kind}/{site}"] = torch.zeros(size, device=matrix.device)

    def add(self, site: Site, x: Tensor, gradient: Tensor) -> None:
        """Fold one batch at one site in."""
        x, gradient = x.float(), gradient.float()
        effect = self.sums[f"effect/{site}"]
        present = x * self.real[..., None].to(x.device)
        self.sums[f"square/{site}"] += present.square().sum((0, 1))
        if site.unit == "neuron":
            self.sums[f"sum/{site}"] += present.sum((0, 1))
            effect += torch.einsum("bpn,bpn->bn", x, gradient).abs().sum(0)
            return
        for n, read, written in zip(self.real.sum(1).tolist(), x, gradient, strict=True):
            effect += (read[:n].T @ written[:n]).abs_()  # an example's own positions: what follows is padding

    def add_losses(self, examples: Tensor, losses: Tensor) -> None:
        """The losses of a batch's examples, and its positions; once a batch."""
        self.sums["loss"][examples.cpu()] = losses.cpu()
        self.sums["n_positions"] += int(self.real.sum())

    def scores(self, behaviour: Behaviour, fingerprint: str) -> Scores:
        """The means, on the CPU; the sums are used up. Raises `InputError` where anything is not finite."""
        losses, n_positions = self.sums["loss"], int(self.sums["n_positions"])
        values = {site: self._value(site, len(losses)) for site in self._sites}
        bad = [str(site) for site in self._sites if not bool(values[site].isfinite().all())]
        if bad or not bool(losses.isfinite().all()):
            raise InputError(
                f"scoring {behaviour.name} gave values that are not finite ({', '.join(bad[:3]) or 'the loss'}): the "
                "model overflows in this dtype"
            )
        neurons = [site for site in self._sites if site.unit == "neuron"]
        return Scores(
            behaviour.name,
            values,
            {site: (self.sums[f"sum/{site}"] / n_positions).cpu() for site in neurons},
            {site: (self.sums[f"square/{site}"] / n_positions).sqrt().cpu() for site in self._sites},
            losses,
            behaviour.prompt_hashes,
            fingerprint,
        )

    def _value(self, site: Site, n_examples: int) -> Tensor:
        value = self.sums.pop(f"effect/{site}").div_(n_examples)
        if site.unit == "weight":
            value *= weight(self._model, site).detach().float().abs()
        return value.cpu()
