"""Importance of every unit to a behaviour, in one pass over its examples (arXiv 2410.16672, section 4, equation 4).

The paper scores a weight by `E |W * dL/dW|`, the expectation over examples. For a neuron the same first-order question,
how much the loss moves when it is silenced, is answered by its activation times its gradient:
`E |sum over positions of a * dL/da|`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import batched
from dean_interp.models.matrices import parameter
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Site, Unit
from dean_interp.models.supported import refuse_not_finite
from dean_interp.models.tokens import Batch, collate
from dean_interp.models.torch_settings import own_torch_settings, refuse_without_gradients
from dean_interp.resume import Unfinished
from dean_interp.scoring.capture import check_hook_gradients, sampled_targets, stream_gradients
from dean_interp.scoring.means import as_scores, further_folds
from dean_interp.scoring.preparation import (
    Prepared,
    ScoringConfig,
    batch_tokens_of,
    facts_of,
    in_passes,
    prepare,
    scored_sites,
    scores_fingerprint,
    units_of,
)
from dean_interp.scoring.products import Fold
from dean_interp.scoring.scores import Scores, refuse_keep
from dean_interp.scoring.site_fields import Also
from dean_interp.scoring.sums import Sums

log = logging.getLogger(__name__)


@own_torch_settings()
def importance(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
    keep: float = 1.0,
    also: Sequence[Also] = (),
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
            the other scores are dropped on the device that scores, as soon as their layers' pass is done.
        also: other means of the same effects from the same pass, for the fields of `Scores` of that name: `signed`,
            `squared`. For weights each takes one more float32 accumulator a weight.
        unfinished: a file for the sums of the finished batches. A call that was killed goes on from there when it is
            made again. Call `resume.discard(path)` once the scores are saved.

    Raises:
        InputError: an unknown unit or setting, a text longer than the model's context, weights or gradients not finite
            (by layer and example), for weights a model whose weights were processed (folded LayerNorm, centred).
    """
    # What can be refused is refused before the first pass.
    units = units_of(unit)
    sites = scored_sites(model, units, config)
    refuse_keep(keep)
    further = further_folds(also, config)
    refuse_not_finite(model)
    refuse_without_gradients(model, str(model.cfg.model_name))
    data = prepare(model, behaviour, config)
    _check_hooks(model, data, sites)
    key = scores_fingerprint(model, behaviour, unit=units, config=config)
    started = Unfinished(unfinished, f"{key} {config}") if unfinished else None
    label = f"scoring {behaviour.name}"
    passes = _passes(model, data, sites, config, label=label, unfinished=started, further=further)
    facts = facts_of(model, behaviour, config, method="importance", data=data)
    scores = as_scores(model, behaviour, passes, data=data, fingerprint=key, facts=facts, keep=keep)
    note_scored(model, behaviour.prompt_hashes)
    return scores


def _passes(
    model: HookedModel,
    data: Prepared,
    sites: Sequence[Site],
    config: ScoringConfig,
    *,
    label: str,
    unfinished: Unfinished | None,
    further: Sequence[Fold],
) -> Iterator[Sums]:
    """Each pass sums some layers' effects over all examples. Its sums become scores before the next pass begins."""
    step = fisher_step if config.target == "fisher" else gradient_step
    for number, pass_sites in enumerate(in_passes(sites, config.layers_per_pass)):
        part = unfinished.part(str(number)) if unfinished else None
        yield run_pass(model, data, pass_sites, config, label=label, unfinished=part, step=step, further=further)


def _check_hooks(model: HookedModel, data: Prepared, sites: Sequence[Site]) -> None:
    """The hook points must hold what the weights read: their gradients are compared on one row."""
    first_row = collate(data.rows[:1], device=model.cfg.device)
    check_hook_gradients(model, first_row, _sites_to_check(model, sites))


def _sites_to_check(model: HookedModel, sites: Sequence[Site]) -> list[Site]:
    """The sites of one layer in the middle whose weights are at hand: an offloaded weight takes no gradient."""
    layers = set()
    for layer in {site.layer for site in sites}:
        stored = [parameter(model, site.matrix)[0] for site in sites if site.layer == layer]
        if not any(matrix.is_meta for matrix in stored):
            layers.add(layer)
    middle = len(model.blocks) // 2
    checked = min(layers, key=lambda layer: abs(layer - middle), default=None)
    if checked is None:
        log.warning("no layer's weights are on a device that computes: hook gradients are not checked against them")
    return [site for site in sites if site.layer == checked]


PassStep = Callable[[HookedModel, Batch, Sequence[Site], Sums], None]
"""What is done with one batch: it runs the model and folds what the sites see into the sums."""


def gradient_step(model: HookedModel, batch: Batch, sites: Sequence[Site], sums: Sums) -> None:
    """One forward and backward pass of one batch, folded into the sums."""
    losses = stream_gradients(model, batch, sites, sums.add, signs=sums.signs())
    sums.add_losses(losses)


def fisher_step(model: HookedModel, batch: Batch, sites: Sequence[Site], sums: Sums) -> None:
    """The same for damage: the log-probability of tokens that the model itself would say, summed over each answer.

    Each answer token is drawn from the model's prediction at its place. Such log-probabilities have gradients of mean
    zero that do not depend on each other, so the square of an answer's summed gradient is, on average, the sum of its
    tokens' Fisher information (Martens 2020, section 5: the true Fisher, not that of the data's tokens).
    """
    # A sum over an answer's tokens is their mean times their number.
    _, index = batch.answer.unique(return_inverse=True)
    n_tokens = torch.bincount(index).float()
    losses = stream_gradients(model, batch, sites, sums.add, signs=n_tokens, targets=sampled_targets)
    sums.add_losses(losses)


def run_pass(
    model: HookedModel,
    data: Prepared,
    sites: Sequence[Site],
    config: ScoringConfig,
    *,
    label: str,
    unfinished: Unfinished | None = None,
    step: PassStep = gradient_step,
    further: Sequence[Fold] = (),
) -> Sums:
    """Run every batch once and return the sums of the sites: those of the config's fold, and of further ones.

    A batch that does not fit into memory is halved, and so are those after it; nothing that was added is lost.
    """
    folds = (config.fold, *further)
    sums = Sums(model, sites, groups=data.groups, rows_each=data.rows_each, folds=folds)
    most_tokens = batch_tokens_of(model, config)
    for batch in batched(
        model,
        data.rows,
        batch_tokens=most_tokens,
        label=label,
        leave=True,
        unfinished=unfinished,
        sums=sums.sums,
        together=data.rows_each,
        padding=config.padding,
    ):
        most_tokens = _fold(model, batch, sites, sums, step=step, most_tokens=most_tokens)
    return sums


def _fold(
    model: HookedModel,
    batch: Batch,
    sites: Sequence[Site],
    sums: Sums,
    *,
    step: PassStep,
    most_tokens: int,
) -> int:
    """Fold one batch at the given sites in, in halves where it holds more than `most_tokens` or memory runs out.

    Returns how many tokens a batch may hold from now on.
    """
    n_examples = len(batch.tokens) // sums.rows_each
    if batch.tokens.numel() <= most_tokens or n_examples == 1:
        sums.begin(batch)
        try:
            step(model, batch, sites, sums)
            return most_tokens
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            if n_examples == 1:
                raise InputError(
                    f"one example of {batch.tokens.shape[1]} tokens does not fit into memory: score fewer layers at "
                    "once (layers_per_pass), shorter texts (max_tokens), or in a smaller dtype"
                ) from error
        # What was folded in before memory ran out is not folded in again.
        sites = [site for site in sites if site not in sums.folded]
        most_tokens = batch.tokens.numel() // 2
        log.warning("out of memory: going on with batches of %d tokens", most_tokens)
    half = n_examples // 2 * sums.rows_each
    first_half = batch.rows(0, half)
    second_half = batch.rows(half, len(batch.tokens))
    for part in (first_half, second_half):
        most_tokens = _fold(model, part, sites, sums, step=step, most_tokens=most_tokens)
    return most_tokens


_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""What errors of allocators say that have no class of their own."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error is an allocator's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    message = str(error)
    return any(words in message for words in _OUT_OF_MEMORY)
