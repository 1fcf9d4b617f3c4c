"""What a scoring run is made of, before its first pass: settings, sites, tokens, a fingerprint, facts for the file."""

import dataclasses
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel, model_fingerprint, versions
from dean_interp.models.matrices import neuron_sites, weight_sites
from dean_interp.models.native_tokenizer import chat_parts, chat_settings, native_tokenizer
from dean_interp.models.notes import notes
from dean_interp.models.plain_layers import refuse_wrapped
from dean_interp.models.sites import Modules, Site, Unit
from dean_interp.models.tokens import Encoded, Padding, Row, Template, cut, encode, paths
from dean_interp.scoring.products import Fold

log = logging.getLogger(__name__)

Target = Literal["response", "margin", "fisher"]
Grouping = Literal["spread", "cluster"]
N_SPREAD_GROUPS = 16
"""Into so many groups `spread` puts the examples, fewer where there are fewer."""


@dataclass(frozen=True)
class ScoringConfig:
    """How examples become scores; the same for every method."""

    template: Template = "chat"
    """How prompt and answer become tokens (`models.tokens.encode`)."""
    target: Target = "response"
    """`response`: the cross-entropy of the scored answer. `margin`: that of the safe answer minus that of the unsafe
    one, so a unit counts by how it moves `log p(safe) - log p(unsafe)`, for behaviours with both answers. `fisher`: the
    damage of a unit, the diagonal of the Fisher information per answer token (`scoring.damage`)."""
    signed: bool = False
    """Keep the sign of the mean effect. Units with a positive score raise the loss, so silencing them lowers it.
    Selections rank by size."""
    groups: Grouping = "spread"
    """The groups of examples whose own neuron scores are kept. `spread`: example `i` is in group `i % 16`. `cluster`:
    one group for each topic (each prompt, where it has no topic), as intervals are clustered. For the target `fisher`
    each example is a group."""
    modules: Modules = "mlp"
    """Which matrices' weights are scored: the MLPs', attention's `q k v o`, or all. Neurons are always the MLPs'."""
    max_tokens: int | None = None
    """Cut answers so that no text is longer. None: a text longer than the model's context is refused."""
    padding: Padding = "right"
    """The side on which batches are padded. Scores do not depend on it beyond float noise."""
    batch_tokens: int | None = None
    """Padded tokens a batch. Memory grows with it, scores do not depend on it. None: 512 on the CPU, where larger
    batches do not fit into its caches, 4096 elsewhere. `scoring.plan` finds what fits."""
    layers_per_pass: int | None = None
    """How many layers' sums are held at once. Fewer take more passes and give the same scores. None: all."""

    @property
    def fold(self) -> Fold:
        """What of an example's effect is added up."""
        if self.target == "fisher":
            return "square"
        return "value" if self.signed else "size"


@dataclass(frozen=True)
class Prepared:
    """A behaviour's examples as rows of tokens."""

    rows: list[Row]
    rows_each: int
    """So many rows that follow each other make one example: 2 for a margin, the safe and the unsafe answer."""
    n_truncated: int
    """How many answers were cut at `max_tokens`."""
    bos: bool
    """Whether texts begin with the tokenizer's BOS."""
    groups: Int[Tensor, " example"]
    """The group of each example, from 0 (`ScoringConfig.groups`)."""
    group_names: tuple[str, ...]
    """The topics (or prompts) that the groups are; empty where examples are spread."""

    @property
    def group_sizes(self) -> Int[Tensor, " group"]:
        """Number of examples of each group."""
        return torch.bincount(self.groups)

    @property
    def answer_lengths(self) -> list[int]:
        """Number of tokens of each answer, in order."""
        lengths = []
        for row in self.rows:
            lengths += [len(branch.tokens) for branch in row if branch.answer >= 0]
        return lengths

    @property
    def n_examples(self) -> int:
        """How many examples the rows make."""
        return len(self.rows) // self.rows_each


def prepare(model: HookedModel, behaviour: Behaviour, config: ScoringConfig) -> Prepared:
    """Tokens of every example.

    Raises `InputError` for what `ScoringConfig` does not allow, for texts too long, and inside an ablation of weights.
    """
    _refuse_config(model, behaviour, config)
    refuse_wrapped(model)
    if notes(model).ablated_weights:
        raise InputError(
            "weights are silenced by hooks here, and scores would be of the weights as the model holds them: write "
            "the edit into the model (`apply_edit`), score, and take it out again (`revert_edit`)"
        )
    encoded, n_truncated = _encoded(model, behaviour, config)
    if n_truncated:
        log.warning("%d answers of %s were cut at %d tokens", n_truncated, behaviour.name, config.max_tokens)
    bos = native_tokenizer(model).bos_token_id
    begin_with_bos = all(tokens.prompt[:1] == (bos,) for tokens in encoded)
    groups, names = grouped(behaviour, config)
    return Prepared(
        rows=paths(encoded),
        rows_each=2 if config.target == "margin" else 1,
        n_truncated=n_truncated,
        bos=bos is not None and begin_with_bos,
        groups=groups,
        group_names=names,
    )


def _encoded(model: HookedModel, behaviour: Behaviour, config: ScoringConfig) -> tuple[list[Encoded], int]:
    """Tokens of every prompt with the answers that are scored, and how many answers were cut."""
    tokenizer = native_tokenizer(model)
    # With max_tokens a long text is cut, else it is refused.
    limit = None if config.max_tokens else model.cfg.n_ctx
    encoded = []
    n_truncated = 0
    for example, response in zip(behaviour.examples, behaviour.responses, strict=True):
        answers = [response]
        if config.target == "margin":
            answers = [example.answers["safe"], example.answers["unsafe"]]
        tokens = encode(tokenizer, example.prompt, answers, template=config.template, n_ctx=limit)
        if config.max_tokens:
            tokens, n_cut = cut(tokens, config.max_tokens)
            n_truncated += n_cut
        encoded.append(tokens)
    return encoded, n_truncated


def grouped(
    behaviour: Behaviour,
    config: ScoringConfig,
) -> tuple[Int[Tensor, " example"], tuple[str, ...]]:
    """The group of each example, and the names of the groups where they are clusters."""
    n_examples = len(behaviour)
    # The Fisher information is made of every example's own gradient.
    if config.target == "fisher":
        return torch.arange(n_examples), ()
    if config.groups == "spread":
        n_groups = min(N_SPREAD_GROUPS, n_examples)
        return torch.arange(n_examples) % n_groups, ()
    # Clusters are numbered in the order in which they are met.
    numbers: dict[str, int] = {}
    groups = []
    for example in behaviour.examples:
        number = numbers.setdefault(example.cluster, len(numbers))
        groups.append(number)
    return torch.tensor(groups), tuple(numbers)


def _refuse_config(model: HookedModel, behaviour: Behaviour, config: ScoringConfig) -> None:
    """Raise `InputError` where a setting is not one of its values, or does not go with the examples or the model."""
    targets = get_args(Target)
    if config.target not in targets:
        raise InputError(f"target must be one of {targets}, got {config.target!r}")
    groupings = get_args(Grouping)
    if config.groups not in groupings:
        raise InputError(f"groups must be one of {groupings}, got {config.groups!r}")
    if config.target == "fisher" and config.signed:
        raise InputError("target='fisher' adds up squares, which have no sign: leave signed=False")
    if config.target == "margin" and not behaviour.paired:
        raise InputError(f"target='margin' needs a safe and an unsafe answer to every prompt of '{behaviour.name}'")
    adapter = adapter_of(model)
    if config.padding == "left" and not adapter.rows_may_pad_left:
        raise InputError(f"a {adapter.kind} is padded on the right only: padding='right', or load a bridge")
    n_ctx = model.cfg.n_ctx
    if config.max_tokens is not None and not 0 < config.max_tokens <= n_ctx:
        raise InputError(f"max_tokens must be in 1..{n_ctx} (the model's context), got {config.max_tokens}")


def batch_tokens_of(model: HookedModel, config: ScoringConfig) -> int:
    """Padded tokens a batch. Raises `InputError` where the config's number is below 1."""
    if config.batch_tokens is None:
        is_on_cpu = torch.device(model.cfg.device).type == "cpu"
        return 512 if is_on_cpu else 4096
    refuse_below_one(batch_tokens=config.batch_tokens)
    return config.batch_tokens


def units_of(unit: Unit | Sequence[Unit]) -> tuple[Unit, ...]:
    """The kinds of unit asked for, in one order. Raises `InputError` where one is unknown."""
    asked = {unit} if isinstance(unit, str) else set(unit)
    known = get_args(Unit)
    if not asked or not asked <= set(known):
        raise InputError(f"unit must be 'neuron', 'weight' or both, got {unit!r}")
    return tuple(kind for kind in known if kind in asked)


def scored_sites(model: HookedModel, units: Sequence[Unit], config: ScoringConfig) -> list[Site]:
    """The sites of the units, neurons first."""
    matrices = weight_sites(model, config.modules) if "weight" in units else []
    neurons = neuron_sites(model) if "neuron" in units else []
    return neurons + matrices


def in_passes(sites: Sequence[Site], layers_per_pass: int | None) -> list[list[Site]]:
    """The sites of each pass: `layers_per_pass` neighbouring layers at a time."""
    refuse_below_one(layers_per_pass=layers_per_pass)
    layers = sorted({site.layer for site in sites})
    size = layers_per_pass or len(layers)
    passes = []
    for start in range(0, len(layers), size):
        pass_layers = layers[start : start + size]
        passes.append([site for site in sites if site.layer in pass_layers])
    return passes


def scores_fingerprint(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit],
    config: ScoringConfig = ScoringConfig(),
    method: str = "importance",
) -> str:
    """Hash of all that scores depend on: model, examples, method, units, settings (but those of the batches)."""
    settings = dataclasses.replace(config, padding="right", batch_tokens=None, layers_per_pass=None)
    parts = [
        model_fingerprint(model),
        behaviour.fingerprint,
        method,
        str(settings),
        *units_of(unit),
    ]
    if config.template == "chat":
        parts += chat_parts(model)
    written = " ".join(parts)
    return hashlib.sha256(written.encode()).hexdigest()[:16]


def facts_of(
    model: HookedModel,
    behaviour: Behaviour,
    config: ScoringConfig,
    *,
    method: str,
    data: Prepared | None = None,
) -> dict[str, Any]:
    """Where scores come from, for their file. `data` is None for methods that look at no example."""
    dtype = next(model.parameters()).dtype
    facts: dict[str, Any] = {
        "method": method,
        "target": config.target,
        "signed": config.signed,
        "groups": config.groups,
        "modules": config.modules,
        "template": config.template,
        "response": behaviour.response,
        "n_examples": len(behaviour),
        "data": behaviour.fingerprint,
        "model": model.cfg.model_name,
        "model_fingerprint": model_fingerprint(model),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": versions(),
    }
    if config.template == "chat":
        settings = dataclasses.asdict(chat_settings(model))
        facts |= {name: value for name, value in settings.items() if value}
    if data is not None:
        facts["n_truncated"] = data.n_truncated
        facts["bos"] = data.bos
        facts["answer_lengths"] = data.answer_lengths
    return facts
