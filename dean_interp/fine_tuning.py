"""Fine-tuning a model on behaviours, the paper's baselines, by `transformers`' Trainer and `peft` (extra `tuning`).

Full, LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353). The paper's fourth, ReFT (arXiv 2404.03592), has no library
that is kept up.
"""

import copy
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import require_one_process
from dean_interp.errors import InputError
from dean_interp.files import atomic_folder, read_json
from dean_interp.models.load import HookedModel, load_model, load_plain
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.tokens import Template, encode

FineTuningMethod = Literal["full", "lora", "dora"]
Watch = Callable[[int, HookedModel], None]
LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "dora": 2e-4}


@dataclass(frozen=True)
class FineTuningConfig:
    """How to fine-tune. The dose is `n_steps * batch_size` examples."""

    method: FineTuningMethod = "full"
    """All parameters, or low-rank adapters on every linear map of the blocks, merged in the end."""
    n_steps: int = 48
    batch_size: int = 8
    learning_rate: float | None = None
    """AdamW's, constant after a tenth of the steps; None: 2e-5 for all parameters, 2e-4 for adapters."""
    rank: int = 16
    """Of adapters; their alpha is twice that."""
    every: int = 16
    """Steps from one look at the model, and one checkpoint to resume from, to the next."""
    seed: int = 0
    """Of the order of the examples and of adapters' first values."""

    def shortened(self) -> "FineTuningConfig":
        """The same for a third of the steps, at least until the first look."""
        return replace(self, n_steps=max(self.every, self.n_steps // 3 // self.every * self.every))

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range, `peft` is needed and missing, or others work too."""
        require_one_process("fine-tuning")
        if self.method not in get_args(FineTuningMethod):
            raise InputError(f"method must be one of {', '.join(get_args(FineTuningMethod))}, got {self.method!r}")
        for name in ("n_steps", "batch_size", "rank", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.n_steps % self.every:
            raise InputError(f"n_steps must be a multiple of every ({self.every}), got {self.n_steps}")
        if self.method != "full" and importlib.util.find_spec("peft") is None:
            raise InputError(f"method {self.method!r} needs the package peft: pip install 'dean_interp[tuning]'")


def fine_tune(
    name: str | Path,
    behaviours: Sequence[Behaviour],
    config: FineTuningConfig = FineTuningConfig(),
    *,
    folder: Path,
    template: Template = "chat",
    watch: Watch | None = None,
    device: str | None = None,
    dtype: str = "float32",
) -> Path:
    """A checkpoint folder of the model, fine-tuned on the answers that the behaviours would score (`response`).

    Cross-entropy on answer tokens and the end of text. Killed and called again, it goes on from its last checkpoint;
    a finished one is not trained again.

    Args:
        name: what `load_model` takes by name.
        folder: for this one fine-tuning; the result is in its `model/`.
        template: how prompt and answer become tokens.
        watch: is shown the model after every `config.every` steps (a copy, adapters merged, in evaluation mode), before
            the checkpoint of that step is written.

    Raises:
        InputError: a setting out of its range, `peft` missing, no behaviour, a test split.
    """
    config.check()
    if not behaviours or any(one.split == "test" for one in behaviours):
        raise InputError("fine-tuning takes calibration splits, at least one; test prompts are for measuring")
    if (folder / "model").is_dir():
        return folder / "model"
    model, tokenizer = load_plain(name, device=device, dtype=dtype)
    rows = [row for one in behaviours for row in _rows(tokenizer, one, template)]
    tuned = model if config.method == "full" else _with_adapters(model, config)
    prompts = frozenset().union(*(one.prompt_hashes for one in behaviours))

    def hooked(trained: Any) -> HookedModel:  # noqa: ANN401 - adapters have a class of peft's
        own = copy.deepcopy(trained)
        merged = own if config.method == "full" else own.merge_and_unload()
        loaded = load_model(merged.eval().requires_grad_(False), tokenizer=tokenizer)
        scored_prompts(loaded).update(prompts)
        return loaded

    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=config.n_steps, per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate or LEARNING_RATE[config.method],
        lr_scheduler_type="constant_with_warmup", warmup_steps=max(1, config.n_steps // 10),
        save_steps=config.every, save_total_limit=1, logging_steps=config.every,
        seed=config.seed, data_seed=config.seed, report_to=[], use_cpu=next(model.parameters()).device.type == "cpu",
        dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        model=tuned, args=arguments, train_dataset=_Rows(rows), data_collator=_padded,
        callbacks=[_Watcher(watch, hooked, config.every)] if watch else [],
    )  # fmt: skip
    checkpoints = list((folder / "trainer").glob("checkpoint-*"))
    for one in checkpoints:
        if not _is_whole(one):
            shutil.rmtree(one)
    trainer.train(resume_from_checkpoint=any(map(Path.is_dir, checkpoints)))
    whole = tuned if config.method == "full" else getattr(tuned, "merge_and_unload")()  # noqa: B009 - a method of peft's
    with atomic_folder(folder / "model") as part:
        whole.save_pretrained(part)
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder / "trainer")
    return folder / "model"


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer was not killed while it wrote this: the state comes last."""
    try:
        read_json(checkpoint / "trainer_state.json", dict[str, Any])
    except InputError:
        return False
    return True


def _rows(tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour, template: Template) -> list[dict[str, list[int]]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = []
    for prompt, response in zip(behaviour.prompts, behaviour.responses, strict=True):
        encoded = encode(tokenizer, prompt, [response], template=template)
        given, answer = list(encoded.prompt), [*encoded.answers[0], *end]
        found.append({"input_ids": given + answer, "attention_mask": [1] * len(given + answer),
                      "labels": [-100] * len(given) + answer})  # fmt: skip
    return found


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch: right-padded, and no tokenizer asked, since many have no padding token."""
    values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=value)
        for name, value in values.items()
    }


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows: Sequence[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def _with_adapters(model: PreTrainedModel, config: FineTuningConfig) -> Any:  # noqa: ANN401 - a class of peft's
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(config.seed)
    return get_peft_model(model, LoraConfig(
        r=config.rank, lora_alpha=2 * config.rank, target_modules="all-linear", use_dora=config.method == "dora",
        task_type="CAUSAL_LM",
    ))  # fmt: skip


class _Watcher(TrainerCallback):
    def __init__(self, watch: Watch, hooked: Callable[[Any], HookedModel], every: int) -> None:
        self.watch, self.hooked, self.every = watch, hooked, every

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401
        if state.global_step % self.every == 0:
            self.watch(state.global_step, self.hooked(given["model"]))
