"""Training on pairs of answers by `transformers`' Trainer, by cross-entropy or by preferences.

Cross-entropy is that of the safe answers' tokens. The preference loss is DPO's (arXiv 2305.18290, equation 7):
`-log sigmoid(beta * (log p(safe) - log p(unsafe) - the same of the reference))`, with log-probabilities of whole
answers, and the model whose adapter is off as the reference. Dropout is off, so that nothing but the adapter differs.
Prompts of a batch share their beginning and answers their prompt (`models.tokens.trees`), as where they are measured.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from dean_interp.arms.adapter_change import AdapterKind
from dean_interp.models.loss import attention_mask
from dean_interp.models.tokens import Batch, Encoded, Row, collate, paths, trees
from dean_interp.models.trainer import TrainingRows, training_arguments
from dean_interp.progress import progress_bar

AdapterLoss = Literal["cross-entropy", "preference"]
Where = Literal["mlp", "all"]


@dataclass(frozen=True)
class AdapterTraining:
    """How an adapter is trained."""

    kind: AdapterKind
    loss: AdapterLoss
    learning_rate: float
    """AdamW's, constant after a tenth of the steps."""
    where: Where = "all"
    """Which matrices get adapters: those of the MLP, or those of attention too."""
    rank: int = 4
    """Rank of LoRA's adapters."""
    beta: float = 0.1
    """How much a preference keeps to the reference."""
    n_steps: int = 16
    """Optimizer steps."""
    batch_size: int = 4
    """Pairs of a step."""
    every: int = 2
    """Steps from one state of the adapter that is kept to the next."""
    seed: int = 0
    """Seed for the order of the pairs and the adapter's first values."""


def train_on_pairs(
    adapted: Any,  # noqa: ANN401 - a class of peft's
    pairs: Sequence[Encoded],
    training: AdapterTraining,
    keep: Callable[[int], None],
    *,
    branched: bool,
) -> None:
    """Train an adapter in place, and call `keep` after every few steps and the last one.

    Args:
        adapted: a model of `peft`.
        pairs: each prompt with its safe answer and its unsafe one, in this order.
        training: loss, steps, learning rate.
        keep: is given the number of steps so far.
        branched: whether the model takes rows that share prompts (`models.loss.shares_prompts`).
    """
    label = f"training {training.kind}, {training.loss}"
    with (
        TemporaryDirectory() as folder,
        progress_bar(total=training.n_steps, desc=label, unit="step", leave=False) as progress,
    ):

        def finish(step: int) -> None:
            progress.update(1)
            if step % training.every == 0 or step == training.n_steps:
                keep(step)

        _trainer(adapted, pairs, training, Path(folder), finish, branched).train()


def _trainer(
    adapted: Any,  # noqa: ANN401
    pairs: Sequence[Encoded],
    training: AdapterTraining,
    folder: Path,
    finish: Callable[[int], None],
    branched: bool,
) -> Any:  # noqa: ANN401 - see the import
    """A trainer with our losses, which calls `finish` after every step, and shows and writes nothing."""
    # Here, since whoever only imports this package needs no trainer, which takes seconds to import.
    from transformers import PrinterCallback, Trainer, TrainerCallback

    class LossOfPairs(Trainer):
        def compute_loss(
            self,
            model: Any,  # noqa: ANN401
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Tensor:
            batch = collate(inputs["rows"], device=self.args.device)
            return loss_of_batch(model.eval(), batch, training)

    class Finisher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401
            finish(state.global_step)

    trainer = LossOfPairs(
        model=adapted,
        args=_arguments(adapted, training, folder),
        train_dataset=TrainingRows(pairs),
        data_collator=lambda chosen: {"rows": _rows_of(chosen, training.loss, branched)},
        callbacks=[Finisher()],
    )
    # It prints where the trainer's own bar is off.
    trainer.remove_callback(PrinterCallback)
    return trainer


def _arguments(adapted: nn.Module, training: AdapterTraining, folder: Path) -> Any:  # noqa: ANN401 - of transformers
    arguments = training_arguments(
        folder,
        adapted,
        n_steps=training.n_steps,
        batch_size=training.batch_size,
        learning_rate=training.learning_rate,
        seed=training.seed,
        silent=True,
    )
    # On several GPUs the trainer would wrap the model, whose adapter is switched off for the reference.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _rows_of(pairs: Sequence[Encoded], loss: AdapterLoss, branched: bool) -> list[Row]:
    """A batch's rows; cross-entropy needs the safe answers alone."""
    if loss == "cross-entropy":
        pairs = [replace(pair, answers=pair.answers[:1]) for pair in pairs]
    return trees(pairs) if branched else paths(pairs)


def loss_of_batch(adapted: Any, batch: Batch, training: AdapterTraining) -> Float[Tensor, ""]:  # noqa: ANN401
    """The loss of a batch of safe answers, or of pairs where preferences are trained."""
    if training.loss == "cross-entropy":
        return -whole_log_probs(adapted, batch).sum() / len(batch.target)
    # The reference comes first: switching the adapter off and on touches what the other pass records.
    with torch.no_grad(), adapted.disable_adapter():
        reference = whole_log_probs(adapted, batch)
    return preference_loss(whole_log_probs(adapted, batch), reference, beta=training.beta)


def preference_loss(
    log_probs: Float[Tensor, " answer"],
    reference: Float[Tensor, " answer"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """DPO's loss (arXiv 2305.18290, equation 7), mean over pairs.

    Args:
        log_probs: log-probabilities of whole answers, nats: each pair's safe one, then its unsafe one.
        reference: the same under the reference.
        beta: how much the loss keeps to the reference.
    """
    safe, unsafe = (log_probs - reference).reshape(-1, 2).unbind(1)
    return -logsigmoid(beta * (safe - unsafe)).mean()


def whole_log_probs(adapted: Any, batch: Batch) -> Float[Tensor, " answer"]:  # noqa: ANN401
    """Log-probability of each whole answer, in nats, in the order of the answers' numbers."""
    plain = adapted.get_base_model()
    mask = attention_mask(batch, plain.dtype)
    # Only where a token's position is not its column does the model need to be told.
    options = {} if batch.attend is None else {"position_ids": batch.positions}
    with _answer_tokens_only(plain, batch):
        logits = adapted(input_ids=batch.tokens, attention_mask=mask, use_cache=False, **options).logits
    log_probs = logits[0].float().log_softmax(-1)
    of_target = log_probs.gather(-1, batch.target[:, None])[:, 0]
    sums = of_target.new_zeros(len(batch.ended))
    return sums.index_add(0, batch.answer, of_target)


@contextmanager
def _answer_tokens_only(plain: Any, batch: Batch) -> Iterator[None]:  # noqa: ANN401
    """While open, the model's logits are `(1, answer_token, d_vocab)`: those that predict an answer token."""

    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][batch.read_row, batch.read_pos][None], *args[1:])

    handle = plain.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
