"""Importance of every unit to a behaviour, in one pass over its examples (arXiv 2410.16672, section 4, equation 4).

The paper scores a weight by `E |W * dL/dW|`. For a neuron the same first-order question, how much the loss moves when
it is silenced, is answered by its activation times its gradient: `E |sum over positions of a * dL/da|`.
"""

import hashlib
from typing import Literal

import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel, model_fingerprint, native_tokenizer
from dean_interp.models.loss import batched
from dean_interp.models.memory import scored_prompts
from dean_interp.models.sites import Site, neuron_sites
from dean_interp.models.tokens import Template, collate, encode, paths
from dean_interp.scoring.capture import check_hook_gradient, stream_gradients
from dean_interp.scoring.scores import Scores

Unit = Literal["neuron"]


def importance(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit = "neuron",
    template: Template = "chat",
    batch_tokens: int = 2048,
) -> Scores:
    """Score every unit of the model for one behaviour.

    Args:
        model: from `load_model`, or any `TransformerBridge` or `HookedTransformer`.
        behaviour: the examples; the answer named by `behaviour.response` is the one whose loss is taken.
        unit: `neuron`, one index of `d_mlp`.
        template: how prompt and answer become tokens (`models.tokens.encode`).
        batch_tokens: padded tokens a batch holds at most; memory grows with it, scores do not depend on it.

    Raises:
        InputError: an unknown unit or template, a text longer than the model's context, loss or scores not finite.
    """
    if unit != "neuron":
        raise InputError(f"unit must be 'neuron', got {unit!r}")
    tokenizer = native_tokenizer(model)
    encoded = [
        encode(tokenizer, prompt, [response], template=template, n_ctx=model.cfg.n_ctx)
        for prompt, response in zip(behaviour.prompts, behaviour.responses, strict=True)
    ]
    rows = paths(encoded)
    check_hook_gradient(model, collate(rows[:1], device=model.cfg.device), layer=model.cfg.n_layers // 2)
    moments = NeuronMoments(model)
    losses = torch.zeros(len(encoded))
    for batch in batched(model, rows, batch_tokens=batch_tokens, label=f"scoring {behaviour.name}", leave=True):
        moments.real = batch.real
        loss = stream_gradients(model, batch, moments.sites, moments.add)
        losses[torch.unique(batch.answer).cpu()] = loss.cpu()
    scores = moments.scores(behaviour, losses, scores_fingerprint(model, behaviour, unit=unit, template=template))
    scored_prompts(model).update(behaviour.prompt_hashes)
    return scores


def scores_fingerprint(model: HookedModel, behaviour: Behaviour, *, unit: Unit, template: Template) -> str:
    """What scores depend on, hashed: model, examples, template, unit."""
    parts = [model_fingerprint(model), behaviour.fingerprint, template, unit]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


class NeuronMoments:
    """Running sums over examples, per neuron: |activation * gradient|, activation, squared activation.

    float32, on the device of each layer's activations. Set `real` (which positions are not padding) before each batch.
    """

    def __init__(self, model: HookedModel) -> None:
        self.sites = neuron_sites(model)
        self.real = torch.zeros(0, 0, dtype=torch.bool)
        self._effect: dict[Site, Tensor] = {}
        self._sum: dict[Site, Tensor] = {}
        self._square: dict[Site, Tensor] = {}
        self._n_positions = dict.fromkeys(self.sites, 0)

    def add(self, site: Site, activation: Tensor, gradient: Tensor) -> None:
        """Fold one batch at one site in."""
        activation = activation.float()
        effect = torch.einsum("bpn,bpn->bn", activation, gradient.float()).abs().sum(0)
        present = activation * self.real[..., None].to(activation.device)
        for sums, value in (
            (self._effect, effect),
            (self._sum, present.sum((0, 1))),
            (self._square, present.square().sum((0, 1))),
        ):
            sums[site] = sums[site] + value if site in sums else value
        self._n_positions[site] += int(self.real.sum())

    def scores(self, behaviour: Behaviour, losses: Tensor, fingerprint: str) -> Scores:
        """The means, on the CPU. Raises `InputError` where anything is not finite."""
        values = {site: (self._effect[site] / len(losses)).cpu() for site in self.sites}
        bad = [str(site) for site in self.sites if not bool(values[site].isfinite().all())]
        if bad or not bool(losses.isfinite().all()):
            raise InputError(
                f"scoring {behaviour.name} gave values that are not finite ({', '.join(bad[:3]) or 'the loss'}): the "
                "model has NaN weights or overflows in this dtype"
            )
        return Scores(
            behaviour.name,
            values,
            {site: (self._sum[site] / self._n_positions[site]).cpu() for site in self.sites},
            {site: (self._square[site] / self._n_positions[site]).sqrt().cpu() for site in self.sites},
            losses,
            behaviour.prompt_hashes,
            fingerprint,
        )
