"""Fine-tuning a model on behaviours, the paper's baselines, by `transformers`' Trainer and `peft` (extra `tuning`).

All parameters, LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353). The paper's fourth baseline, ReFT
(arXiv 2404.03592), has no library that is kept up.
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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import require_one_process
from dean_interp.errors import InputError, refuse_below
from dean_interp.files import atomic_folder, read_json
from dean_interp.models.chat_settings import ChatSettings, with_settings
from dean_interp.models.expert_hooks import refuse_experts
from dean_interp.models.load import Dtype, HookedModel, load_model, load_plain
from dean_interp.models.plain import save_model
from dean_interp.models.scored_prompts import scored_prompts
from dean_interp.models.tokens import Template, encode
from dean_interp.models.torch_settings import own_torch_settings

FineTuningMethod = Literal["full", "lora", "dora"]
Watch = Callable[[int, HookedModel], None]
LEARNING_RATE = {"full": 2e-5, "lora": 2e-4, "dora": 2e-4}


@dataclass(frozen=True)
class FineTuningConfig:
    """How to fine-tune. The model sees `n_steps * batch_size` examples."""

    method: FineTuningMethod = "full"
    """What is trained: all parameters, or low-rank adapters on every linear map of the blocks, merged in the end."""
    n_steps: int = 48
    """Number of optimizer steps."""
    batch_size: int = 8
    """Number of examples in each step."""
    learning_rate: float | None = None
    """Learning rate of AdamW, constant after a tenth of the steps. Unset: 2e-5 for all parameters, 2e-4 for
    adapters."""
    rank: int = 16
    """Rank of the adapters; their alpha is twice that."""
    every: int = 16
    """Number of steps between two looks at the model. At each look a checkpoint is written, to resume from."""
    seed: int = 0
    """Seed for the order of the examples and the adapters' first values."""

    def shortened(self) -> "FineTuningConfig":
        """The same for a third of the steps, at least until the first look."""
        n_looks = self.n_steps // 3 // self.every
        return replace(self, n_steps=max(self.every, n_looks * self.every))

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range, `peft` is needed and missing, or others work too."""
        require_one_process("fine-tuning")
        if self.method not in get_args(FineTuningMethod):
            raise InputError(f"method must be one of {', '.join(get_args(FineTuningMethod))}, got {self.method!r}")
        refuse_below(self, {"n_steps": 1, "batch_size": 1, "rank": 1, "every": 1})
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise InputError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.n_steps % self.every:
            raise InputError(f"n_steps must be a multiple of every ({self.every}), got {self.n_steps}")
        if self.method != "full" and importlib.util.find_spec("peft") is None:
            raise InputError(f"method {self.method!r} needs the package peft: pip install 'dean_interp[tuning]'")


@own_torch_settings()
def fine_tune(
    name: str | Path,
    behaviours: Sequence[Behaviour],
    config: FineTuningConfig = FineTuningConfig(),
    *,
    folder: Path,
    template: Template = "chat",
    watch: Watch | None = None,
    device: str | None = None,
    dtype: Dtype = "float32",
    adapter: str | None = None,
) -> Path:
    """A checkpoint folder of the model, fine-tuned on the answers that the behaviours would score (`response`).

    Cross-entropy on answer tokens and the end of text. Killed and called again, it goes on from its last checkpoint;
    a finished one is not trained again.

    Args:
        name: what `load_model` takes by name.
        behaviours: calibration splits, at least one.
        config: method, steps, learning rate.
        folder: for this fine-tuning alone; the result is in its `model/`.
        template: how prompt and answer become tokens.
        watch: is shown the model after every `config.every` steps (a copy, adapters merged, in evaluation mode), before
            the checkpoint of that step is written.
        device: where the model is trained; `None` takes CUDA where there is one, else the CPU.
        dtype: of the weights, and `adapter`, which is merged before training, as `load_model` takes them.

    Raises `InputError` for a setting out of its range, `peft` missing, no behaviour, a test split.
    """
    config.check()
    if not behaviours or any(behaviour.split == "test" for behaviour in behaviours):
        raise InputError("fine-tuning takes calibration splits, at least one; test prompts are for measuring")
    if (folder / "model").is_dir():
        return folder / "model"
    model, tokenizer = load_plain(name, device=device, dtype=dtype, adapter=adapter)
    rows = [row for behaviour in behaviours for row in _rows(tokenizer, behaviour, template)]
    trained = model if config.method == "full" else _with_adapters(model, config)

    def show(step: int, trained_so_far: Any) -> None:  # noqa: ANN401 - a class of peft's
        assert watch is not None
        watch(step, _hooked_copy(trained_so_far, tokenizer, config, behaviours))

    callbacks = [_watcher(show, config.every)] if watch else []
    _train(trained, rows, config, folder / "trainer", callbacks)
    with atomic_folder(folder / "model") as part:
        save_model(_merged(trained, config), part)
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder / "trainer")
    return folder / "model"


def _hooked_copy(
    trained: Any,  # noqa: ANN401 - adapters have a class of peft's
    tokenizer: PreTrainedTokenizerBase,
    config: FineTuningConfig,
    behaviours: Sequence[Behaviour],
) -> HookedModel:
    """A copy in evaluation mode, adapters merged, which is not measured on what it was trained on."""
    merged = _merged(copy.deepcopy(trained), config)
    hooked = load_model(merged.eval().requires_grad_(False), tokenizer=tokenizer)
    for behaviour in behaviours:
        scored_prompts(hooked).update(behaviour.prompt_hashes)
    return hooked


def _train(
    model: Any,  # noqa: ANN401 - adapters have a class of peft's
    rows: Sequence[dict[str, list[int]]],
    config: FineTuningConfig,
    folder: Path,
    callbacks: list[Any],
) -> None:
    """Trains in place, from the last checkpoint in the folder that is whole."""
    from transformers import Trainer

    arguments = training_arguments(
        folder,
        model,
        n_steps=config.n_steps,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate or LEARNING_RATE[config.method],
        seed=config.seed,
    )
    arguments.save_steps = arguments.logging_steps = config.every
    arguments.save_total_limit = 1
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=TrainingRows(rows),
        data_collator=_padded,
        callbacks=callbacks,
    )
    # A checkpoint that was being written when the call was killed is of no use.
    checkpoints = list(folder.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    trainer.train(resume_from_checkpoint=any(checkpoint.is_dir() for checkpoint in checkpoints))


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


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer was not killed while it wrote this: the state comes last."""
    try:
        read_json(checkpoint / "trainer_state.json", dict[str, Any])
    except InputError:
        return False
    return True


def _rows(tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour, template: Template) -> list[dict[str, list[int]]]:
    """Each example as the trainer takes it; labels of -100 are not learned."""
    # The folder gets the tokenizer as it was; what is learned is of one day.
    dated, _ = with_settings(tokenizer, ChatSettings())
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for prompt, response in zip(behaviour.prompts, behaviour.responses, strict=True):
        encoded = encode(dated, prompt, [response], template=template)
        given, answer = list(encoded.prompt), [*encoded.answers[0], *end]
        row = {
            "input_ids": given + answer,
            "attention_mask": [1] * len(given + answer),
            "labels": [-100] * len(given) + answer,
        }
        rows.append(row)
    return rows


def _padded(rows: Sequence[Mapping[str, list[int]]]) -> dict[str, torch.Tensor]:
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


def _with_adapters(model: PreTrainedModel, config: FineTuningConfig) -> Any:  # noqa: ANN401 - a class of peft's
    from peft import LoraConfig, get_peft_model

    refuse_experts(model, f"adapters ({config.method})")
    torch.manual_seed(config.seed)
    adapters = LoraConfig(
        r=config.rank,
        lora_alpha=2 * config.rank,
        target_modules="all-linear",
        use_dora=config.method == "dora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, adapters)


def _merged(trained: Any, config: FineTuningConfig) -> PreTrainedModel:  # noqa: ANN401 - a class of peft's
    """The model with what its adapters learned in its weights."""
    return trained if config.method == "full" else trained.merge_and_unload()


def _watcher(show: Callable[[int, Any], None], every: int) -> Any:  # noqa: ANN401 - see the import
    """A callback of the trainer that shows step and model every so many steps."""
    # here, since whoever only imports this package needs no trainer, which takes seconds to import
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401
            if state.global_step % every == 0:
                show(state.global_step, given["model"])

    return Watcher()
