"""What a run sends through the model, counted from its examples: tokens in batches, over all its states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dean_interp.data.examples import Behaviour
from dean_interp.evaluation.measure import encoded_answers
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.tokens import Template, encode, trees
from dean_interp.planning.amounts import Amount, Count, PassKind, amount_of
from dean_interp.planning.estimates import Estimates
from dean_interp.scoring.preparation import ScoringConfig, Target, prepare
from dean_interp.study.settings import AnswerConfig, DataConfig

Amounts = Mapping[PassKind, Amount]
"""What goes through the model in passes of each kind."""


def added(*parts: Amounts) -> Amounts:
    """All passes of several parts."""
    total: dict[PassKind, Amount] = {}
    for part in parts:
        for kind, amount in part.items():
            total[kind] = total.get(kind, Amount()) + amount
    return total


def repeated(amounts: Amounts, times: Count) -> Amounts:
    """The same passes so many times."""
    return {kind: amount * times for kind, amount in amounts.items()}


@dataclass(frozen=True)
class StepWork:
    """What one step of a run does."""

    step: str
    """Its name, as in the run's `times.json`."""
    amounts: Amounts = field(default_factory=dict)
    estimates: Estimates | None = None
    """The mutual information that is estimated; nothing goes through the model for it."""
    sums_gib: float = 0.0
    """Running sums, beside the weights."""
    kept_gib: float = 0.0
    """What every process keeps in host memory."""
    disk_gib: float = 0.0
    """What is written."""


@dataclass(frozen=True)
class WorkCounter:
    """Counts the passes of one model, as a run makes them."""

    model: HookedModel
    """With or without its weights."""
    template: Template
    score_tokens: int
    data: DataConfig
    answers: AnswerConfig

    def scored(self, behaviours: Sequence[Behaviour], kind: PassKind, *, target: Target = "response") -> Amounts:
        """One pass of scoring over each of the behaviours."""
        config = ScoringConfig(template=self.template, target=target)
        total = Amount()
        for behaviour in behaviours:
            data = prepare(self.model, behaviour, config)
            total += amount_of(data.rows, batch_tokens=self.score_tokens, together=data.rows_each)
            # The hooks are checked on the first row: twice forward, and back to a layer in the middle.
            first_row = amount_of(data.rows[:1], batch_tokens=self.score_tokens)
            total += first_row * 1.5
        return {kind: total}

    def measured(self, behaviours: Sequence[Behaviour], *, with_kl: bool = False) -> Amounts:
        """One measurement of behaviours. With KL, what the original unembedded is unembedded again."""
        total = Amount()
        for behaviour in behaviours:
            answers = encoded_answers(
                self.model, behaviour, template=self.template, answer_tokens=self.data.answer_tokens
            )
            total += amount_of(trees(answers), batch_tokens=self.data.measure_tokens)
        if with_kl:
            total += Amount(n_logits=total.n_logits)
        return {"forward": total}

    def state(self, tests: Sequence[Behaviour], *, with_kl: bool = True) -> Amounts:
        """One state on first, second and general text, whose KL to the original is taken."""
        paired, general = tests[:2], tests[2:]
        return added(self.measured(paired), self.measured(general, with_kl=with_kl))

    def answered(self, behaviours: Sequence[Behaviour]) -> Amounts:
        """The answers of one state to every prompt, none of which ends before its length."""
        tokenizer = native_tokenizer(self.model)
        n_new = max(self.answers.answer_lengths, default=0)
        if not n_new:
            return {"forward": Amount(), "answer": Amount()}
        lengths = []
        for behaviour in behaviours:
            for prompt in behaviour.prompts:
                encoded = encode(tokenizer, prompt, [], template=self.template)
                lengths.append(len(encoded.prompt))
        # Long prompts come first, and a batch is padded to its longest.
        lengths.sort(reverse=True)
        prompts = steps = Amount()
        for start in range(0, len(lengths), self.answers.answer_batch):
            batch = lengths[start : start + self.answers.answer_batch]
            longest = batch[0]
            n_rows = len(batch)
            n_tokens = n_rows * longest
            prompts += Amount(
                n_calls=1,
                n_rows=n_rows,
                n_tokens=n_tokens,
                n_pairs=n_tokens * longest,
                n_logits=n_rows,
            )
            n_answered = n_new * n_rows
            steps += Amount(n_calls=n_new, n_tokens=n_answered, n_logits=n_answered)
        return {"forward": prompts, "answer": steps}
