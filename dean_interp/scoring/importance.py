"""Importance of every unit to a behaviour, in one pass over its examples (arXiv 2410.16672, section 4, equation 4).

The paper scores a weight by `E |W * dL/dW|`, the expectation over examples. For a neuron the same first-order question,
how much the loss moves when it is silenced, is answered by its activation times its gradient:
`E |sum over positions of a * dL/da|`.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel, model_fingerprint, native_tokenizer, refuse_not_finite, versions
from dean_interp.models.loss import batched
from dean_interp.models.matrices import parameter, weight, weight_sites
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.sites import Modules, Site, Unit, neuron_sites
from dean_interp.models.tokens import Batch, Padding, Row, Template, collate, cut, encode, paths
from dean_interp.resume import Unfinished
from dean_interp.scoring.capture import check_hook_gradients, stream_gradients
from dean_interp.scoring.scores import Scores, Top, refuse_keep, thinned
from dean_interp.scoring.sums import Sums, group_sizes

log = logging.getLogger(__name__)

Target = Literal["response", "margin"]


@dataclass(frozen=True)
class ScoringConfig:
    """How examples become scores; the same for every method."""

    template: Template = "chat"
    """How prompt and answer become tokens (`models.tokens.encode`)."""
    target: Target = "response"
    """`response`: the cross-entropy of the scored answer. `margin`: that of the safe answer minus that of the unsafe
    one, so a unit counts by how it moves `log p(safe) - log p(unsafe)`; behaviours with both answers only."""
    signed: bool = False
    """Keep the sign of the mean effect, which the absolute value throws away: positive units raise the loss, so to
    silence them lowers it. Selections rank by size."""
    modules: Modules = "mlp"
    """Which matrices' weights are scored: the MLPs', attention's `q k v o`, or all. Neurons are the MLPs'."""
    max_tokens: int | None = None
    """Cut answers so that no text is longer. None: a text longer than the model's context is refused."""
    padding: Padding = "right"
    """The side on which batches are padded. Scores do not depend on it beyond float noise."""
    batch_tokens: int | None = None
    """Padded tokens a batch; memory grows with it, scores do not depend on it. None: 512 on the CPU, where larger
    batches fall out of its caches, 4096 elsewhere. `scoring.plan` finds what fits."""
    layers_per_pass: int | None = None
    """How many layers' sums are held at once; fewer take more passes, and the same scores come out. None: all."""


def importance(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = ScoringConfig(),
    keep: float = 1.0,
    unfinished: Path | None = None,
) -> Scores:
    """Score every unit of the model for one behaviour, by gradients at hook points.

    Args:
        model: from `load_model`, or any `TransformerBridge` or `HookedTransformer`.
        behaviour: the examples; the answer named by `behaviour.response` is the one whose loss is taken.
        unit: `neuron` (one index of `d_mlp`), `weight` (one entry of a matrix, the paper's unit), or both in one pass:
            `("neuron", "weight")`. Weights take one float32 accumulator a weight.
        config: template, target, sign, modules, batches.
        keep: the top fraction of each matrix's weights whose scores are kept (`Scores.kept`). Less than 1 saves memory:
            the others go as soon as their layers' pass is done.
        unfinished: a file for what the finished batches left. A call that was killed goes on from there when it is
            made again; `unfinished.discard(path)` once the scores are saved.

    Raises:
        InputError: an unknown unit or setting, a text longer than the model's context, weights or gradients not finite
            (by layer and example), for weights a model whose weights were processed (folded LayerNorm, centred).
    """
    units = units_of(unit)
    sites = scored_sites(model, units, config)
    refuse_keep(keep)
    refuse_not_finite(model)
    data = prepare(model, behaviour, config)
    check_hook_gradients(model, collate(data.rows[:1], device=model.cfg.device), _checked(model, sites))
    key = scores_fingerprint(model, behaviour, unit=units, config=config)

    def passes() -> Iterator[Sums]:
        for number, some in enumerate(in_passes(sites, config.layers_per_pass)):
            saved = Unfinished(unfinished, f"{key} {config}").part(str(number)) if unfinished else None
            sums = Sums(model, some, n_examples=len(behaviour), rows_each=data.rows_each, signed=config.signed)
            run_pass(model, data, sums, config, label=f"scoring {behaviour.name}", unfinished=saved)
            yield sums

    facts = facts_of(model, behaviour, "importance", config, data)
    scores = as_scores(model, behaviour, passes(), key, facts, keep=keep)
    scored_prompts(model).update(behaviour.prompt_hashes)
    return scores


def _checked(model: HookedModel, sites: Sequence[Site]) -> list[Site]:
    """The sites of one layer in the middle whose weights are at hand: what is away takes no gradient."""
    here = {site.layer for site in sites}
    here -= {layer for layer in here if parameter(model, Site(layer, "out"))[0].is_meta}
    layer = min(here, key=lambda one: abs(one - model.cfg.n_layers // 2), default=None)
    if layer is None:
        log.warning("no layer's weights are on a device that computes: hook gradients are not checked against them")
    return [site for site in sites if site.layer == layer]


@dataclass(frozen=True)
class Prepared:
    """A behaviour's examples as rows of tokens."""

    rows: list[Row]
    rows_each: int
    n_truncated: int
    bos: bool
    """Whether texts begin with the tokenizer's BOS."""


def prepare(model: HookedModel, behaviour: Behaviour, config: ScoringConfig) -> Prepared:
    """Tokens of every example. Raises `InputError` for what `ScoringConfig` does not allow, and for texts too long."""
    if config.target not in get_args(Target):
        raise InputError(f"target must be one of {get_args(Target)}, got {config.target!r}")
    if config.target == "margin" and not behaviour.paired:
        raise InputError(f"target='margin' needs a safe and an unsafe answer to every prompt of '{behaviour.name}'")
    adapter = adapter_of(model)
    if config.padding == "left" and not adapter.rows_may_pad_left:
        raise InputError(f"a {adapter.kind} is padded on the right only: padding='right', or load a bridge")
    n_ctx = model.cfg.n_ctx
    if config.max_tokens is not None and not 0 < config.max_tokens <= n_ctx:
        raise InputError(f"max_tokens must be in 1..{n_ctx} (the model's context), got {config.max_tokens}")
    tokenizer = native_tokenizer(model)
    encoded, n_truncated = [], 0
    for example, response in zip(behaviour.examples, behaviour.responses, strict=True):
        answers = [example.answers[kind] for kind in ("safe", "unsafe")] if config.target == "margin" else [response]
        limit = None if config.max_tokens else n_ctx
        one = encode(tokenizer, example.prompt, answers, template=config.template, n_ctx=limit)
        if config.max_tokens:
            one, n_cut = cut(one, config.max_tokens)
            n_truncated += n_cut
        encoded.append(one)
    if n_truncated:
        log.warning("%d answers of %s were cut at %d tokens", n_truncated, behaviour.name, config.max_tokens)
    bos = tokenizer.bos_token_id is not None and all(one.prompt[:1] == (tokenizer.bos_token_id,) for one in encoded)
    return Prepared(paths(encoded), 2 if config.target == "margin" else 1, n_truncated, bos)


PassStep = Callable[[HookedModel, Batch, Sequence[Site], Sums], None]


def gradient_step(model: HookedModel, batch: Batch, sites: Sequence[Site], sums: Sums) -> None:
    """One forward and backward pass of one batch, folded into the sums."""
    sums.add_losses(stream_gradients(model, batch, sites, sums.add, signs=sums.signs()))


def run_pass(
    model: HookedModel,
    data: Prepared,
    sums: Sums,
    config: ScoringConfig,
    *,
    label: str,
    unfinished: Unfinished | None = None,
    step: PassStep = gradient_step,
) -> None:
    """Every batch once, into `sums`.

    A batch that does not fit into memory is halved, and so are those after it; nothing that was added is lost.
    """
    batch_tokens = batch_tokens_of(model, config)
    fits = [batch_tokens]
    options = {"label": label, "leave": True, "unfinished": unfinished, "sums": sums.sums}
    layout = {"batch_tokens": batch_tokens, "together": data.rows_each, "padding": config.padding}
    for batch in batched(model, data.rows, **options, **layout):
        _fold(model, batch, sums, sums.sites, fits, step)


def _fold(model: HookedModel, batch: Batch, sums: Sums, sites: Sequence[Site], fits: list[int], step: PassStep) -> None:
    """One batch at the given sites. What was folded in before memory ran out is not folded in again."""
    n_examples = len(batch.tokens) // sums.rows_each
    if batch.tokens.numel() <= fits[0] or n_examples == 1:
        sums.begin(batch)
        try:
            step(model, batch, sites, sums)
            return
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if n_examples == 1:
                raise InputError(
                    f"one example of {batch.tokens.shape[1]} tokens does not fit into memory: score fewer layers at "
                    "once (layers_per_pass), shorter texts (max_tokens), or in a smaller dtype"
                ) from error
            sites = [site for site in sites if site not in sums.folded]
            fits[0] = batch.tokens.numel() // 2
            log.warning("out of memory: going on with batches of %d tokens", fits[0])
    half = n_examples // 2 * sums.rows_each
    for part in (batch.rows(0, half), batch.rows(half, len(batch.tokens))):
        _fold(model, part, sums, sites, fits, step)


def batch_tokens_of(model: HookedModel, config: ScoringConfig) -> int:
    """Padded tokens a batch."""
    if config.batch_tokens is None:
        return 512 if torch.device(model.cfg.device).type == "cpu" else 4096
    if config.batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1, got {config.batch_tokens}")
    return config.batch_tokens


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
    )


def as_scores(
    model: HookedModel,
    behaviour: Behaviour,
    passes: Iterable[Sums],
    fingerprint: str,
    facts: Mapping[str, Any],
    *,
    keep: float = 1.0,
) -> Scores:
    """The means over examples, on the CPU. The sums are used up, those of a pass before the next one runs."""
    loss = torch.zeros(0)
    values: dict[Site, Tensor | Top] = {}
    means: dict[Site, Tensor] = {}
    norms: dict[Site, Tensor] = {}
    groups: dict[Site, Tensor] = {}
    for one in passes:
        n_examples, n_positions, loss = len(behaviour), int(one.sums["n_positions"]), one.sums["loss"]
        for site in one.sites:
            effect = one.sums.pop(f"effect/{site}")
            if site.unit == "neuron":
                counts = group_sizes(n_examples).to(effect.device)
                groups[site] = (effect / counts[:, None]).cpu()
                values[site] = (effect.sum(0) / n_examples).cpu()
                means[site] = (one.sums.pop(f"sum/{site}") / n_positions).cpu()
            else:
                matrix = weight(model, site).detach().float()
                value = effect.div_(n_examples).mul_(matrix if one.signed else matrix.abs())
                values[site] = thinned(behaviour.name, site, value, keep).cpu()
            norms[site] = (one.sums.pop(f"square/{site}") / n_positions).sqrt().cpu()
        give_back()
    return Scores(
        behaviour.name,
        dict(sorted(values.items())),
        dict(sorted(means.items())),
        dict(sorted(norms.items())),
        dict(sorted(groups.items())),
        loss,
        behaviour.prompt_hashes,
        fingerprint,
        facts,
    )


def give_back() -> None:
    """What glibc keeps of freed memory goes back to the system, or it would count as held."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def scores_fingerprint(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit],
    config: ScoringConfig = ScoringConfig(),
    method: str = "importance",
) -> str:
    """What scores depend on, hashed: model, examples, method, settings other than those of the batches, units."""
    settings = dataclasses.replace(config, padding="right", batch_tokens=None, layers_per_pass=None)
    parts = [model_fingerprint(model), behaviour.fingerprint, method, str(settings), *units_of(unit)]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


def facts_of(
    model: HookedModel, behaviour: Behaviour, method: str, config: ScoringConfig, data: Prepared | None = None
) -> dict[str, Any]:
    """Where scores come from, for their file."""
    facts = {
        "method": method,
        "target": config.target,
        "signed": config.signed,
        "modules": config.modules,
        "template": config.template,
        "response": behaviour.response,
        "n_examples": len(behaviour),
        "data": behaviour.fingerprint,
        "model": model.cfg.model_name,
        "model_fingerprint": model_fingerprint(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "versions": versions(),
    }
    return facts | ({"n_truncated": data.n_truncated, "bos": data.bos} if data else {})


def units_of(unit: Unit | Sequence[Unit]) -> tuple[Unit, ...]:
    """The kinds of unit asked for, in one order. Raises `InputError` where one is unknown."""
    given = {unit} if isinstance(unit, str) else set(unit)
    known = get_args(Unit)
    if not given or not given <= set(known):
        raise InputError(f"unit must be 'neuron', 'weight' or both, got {unit!r}")
    return tuple(one for one in known if one in given)


def scored_sites(model: HookedModel, units: Sequence[Unit], config: ScoringConfig) -> list[Site]:
    """The sites of the units, neurons first."""
    matrices = weight_sites(model, config.modules) if "weight" in units else []
    return (neuron_sites(model) if "neuron" in units else []) + matrices


def in_passes(sites: Sequence[Site], layers_per_pass: int | None) -> list[list[Site]]:
    """The sites of each pass: `layers_per_pass` neighbouring layers at a time."""
    if layers_per_pass is not None and layers_per_pass < 1:
        raise InputError(f"layers_per_pass must be at least 1, got {layers_per_pass}")
    layers = sorted({site.layer for site in sites})
    size = layers_per_pass or len(layers)
    return [
        [site for site in sites if site.layer in layers[start : start + size]] for start in range(0, len(layers), size)
    ]
