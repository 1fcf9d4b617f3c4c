"""The Trainer of `transformers` as it is used here: its settings, and examples in the form that it takes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence


def training_arguments(
    folder: Path,
    model: torch.nn.Module,
    *,
    n_steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    silent: bool = False,
) -> Any:  # noqa: ANN401 - see the import
    """The trainer's settings: AdamW on the model's device, its rate constant after a tenth of the steps; no reports.

    Args:
        folder: what the trainer writes goes there.
        model: says which device.
        n_steps: optimizer steps.
        batch_size: rows of a step.
        learning_rate: the constant one.
        seed: for the order of the rows.
        silent: no bar and no log, and rows of any form; nothing is written.
    """
    # here, since whoever only imports this package needs no trainer, which takes seconds to import
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=n_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=max(1, n_steps // 10),
        seed=seed,
        data_seed=seed,
        report_to=[],
        use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
        disable_tqdm=True if silent else None,
        remove_unused_columns=not silent,
        label_names=["labels"],
        logging_strategy="no" if silent else "steps",
        save_strategy="no" if silent else "steps",
    )


def padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch: right-padded, and no tokenizer asked, since many have no padding token."""
    batch = {}
    for name, padding in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
        values = [torch.tensor(row[name]) for row in rows]
        batch[name] = pad_sequence(values, batch_first=True, padding_value=padding)
    return batch


class TrainingRows(torch.utils.data.Dataset):
    """Examples as the trainer takes them."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:  # noqa: ANN401
        return self.rows[index]
