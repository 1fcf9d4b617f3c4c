"""What a study sends through the model: how many tokens in how many batches, over all its states."""

from collections.abc import Sequence
from dataclasses import dataclass

from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.measure import encoded_answers
from dean_interp.models.load import HookedModel
from dean_interp.models.sizes import neuron_counts, unembedding_shape
from dean_interp.models.tokens import Row, batches, row_length, trees
from dean_interp.study.config import StudyConfig
from dean_interp.study.study_data import StudyData

_EQUAL_KL_TRIES = 3
"""Sizes that an equal-KL control takes; the KL of the last one is its own."""
_NAMED_CONTROLS = 4


@dataclass(frozen=True)
class Work:
    """What goes through the model in each step, over all states of the model."""

    scored_tokens: int
    """Padded tokens of one pass of scoring."""
    score_batches: int
    measured_tokens: int
    """Padded tokens."""
    measure_batches: int
    answered_tokens: int
    """New tokens."""
    answer_batches: int
    """Batches of one new token each."""
    state_bytes: float
    """What the states keep on disk."""


def work_of(model: HookedModel, config: StudyConfig, data: StudyData, scored_rows: Sequence[Sequence[Row]]) -> Work:
    """What `study.run` sends through the model."""
    score_tokens, measure_tokens = config.calibration.score_tokens, config.data.measure_tokens
    scored, score_batches = _padded_tokens(scored_rows, score_tokens)
    # Every state is measured on all three test sets. While an equal-KL control is grown, general text is enough.
    controls, n_units = config.controls, len(config.unit)
    n_states = 1 + n_units * (1 + controls.n_random + controls.n_equal_kl + _NAMED_CONTROLS)
    n_tries = n_units * controls.n_equal_kl * (_EQUAL_KL_TRIES - 1)
    first, second, general = (_measured_rows(model, config, test) for test in data.tests)
    on_all, batches_on_all = _padded_tokens([first, second, general], measure_tokens)
    on_general, batches_on_general = _padded_tokens([general], measure_tokens)
    # Probes are fitted on the calibration answers of the original, where all have two.
    probed = data.calibration[:2] if all(behaviour.paired for behaviour in data.calibration[:2]) else []
    probed_rows = [_measured_rows(model, config, behaviour) for behaviour in probed]
    on_probed, batches_on_probed = _padded_tokens(probed_rows, measure_tokens)
    # The original, each edit and a few controls answer every prompt.
    n_answering = 1 + n_units * (1 + _n_answer_controls(config))
    n_answers = n_answering * sum(map(len, data.prompts.all))
    n_new = max(config.answers.answer_lengths, default=0)
    n_neurons = config.information_fraction * sum(neuron_counts(model))
    # Each state keeps activations where a prompt and its two answers end, of two behaviours, in float32. Neurons in
    # both tops are left out: about half.
    per_state = 4 * 3 * 2 * config.data.n_test * n_neurons
    # Of the original it is also kept what the unembedding reads of general text.
    of_original = 4 * on_general * unembedding_shape(model)[0]
    return Work(
        scored_tokens=scored,
        score_batches=score_batches,
        measured_tokens=n_states * on_all + n_tries * on_general + on_probed,
        measure_batches=n_states * batches_on_all + n_tries * batches_on_general + batches_on_probed,
        answered_tokens=n_answers * n_new,
        answer_batches=n_new * -(-n_answers // config.answers.answer_batch),
        state_bytes=n_states * per_state + of_original,
    )


def _n_answer_controls(config: StudyConfig) -> int:
    """How many controls of each edit answer: no more than the last kind has."""
    n_of_last_kind = config.controls.n_equal_kl or config.controls.n_random
    return min(config.answers.n_answer_controls, n_of_last_kind)


def _measured_rows(model: HookedModel, config: StudyConfig, behaviour: Behaviour) -> list[Row]:
    """The rows of a behaviour's answers, cut as the study cuts them."""
    answer_tokens = config.data.answer_tokens
    return trees(encoded_answers(model, behaviour, template=config.model.template, answer_tokens=answer_tokens))


def _padded_tokens(sets: Sequence[Sequence[Row]], batch_tokens: int) -> tuple[int, int]:
    """How many padded tokens several sets of rows make, and how many batches."""
    planned = []
    for rows in sets:
        planned += batches(rows, batch_tokens=batch_tokens)
    return sum(len(batch) * max(map(row_length, batch)) for batch in planned), len(planned)
