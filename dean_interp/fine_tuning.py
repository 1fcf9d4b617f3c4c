"""Fine-tuning a model on behaviours, the paper's baselines, by `transformers`' Trainer and `peft` (extra `tuning`).

All parameters, LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353). The paper's fourth baseline, ReFT
(arXiv 2404.03592), has no library that is kept up.
"""

import copy
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.data.examples import Behaviour, data_fingerprints
from dean_interp.distributed import require_one_process
from dean_interp.errors import InputError, refuse_below
from dean_interp.files import atomic_folder, read_json, write_json
from dean_interp.models.chat_settings import ChatSettings, with_settings
from dean_interp.models.expert_hooks import refuse_experts
from dean_interp.models.load import Dtype, HookedModel, load_model, load_plain, weights_fingerprint
from dean_interp.models.plain import save_model
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.tokens import Template, encode
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.models.trainer import TrainingRows, padded, training_arguments
from dean_interp.resume import CONFIG_FILE, RunSettings, refuse_other_settings

FineTuningMethod = Literal["full", "lora", "dora"]
Watch = Callable[[int, HookedModel], None]
_Settings = RunSettings[dict[str, Any]]
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
        folder: for this fine-tuning alone; `config.json` says what it was begun with, and the result is in `model/`.
        template: how prompt and answer become tokens.
        watch: is shown the model after every `config.every` steps (a copy, adapters merged, in evaluation mode), before
            the checkpoint of that step is written.
        device: where the model is trained; `None` takes CUDA where there is one, else the CPU.
        dtype: of the weights, and `adapter`, which is merged before training, as `load_model` takes them.

    Raises `InputError` for a setting out of its range, `peft` missing, no behaviour, a test split; a folder with
    another fine-tuning.
    """
    config.check()
    wanted = _settings(config, behaviours, template)
    begun = _begun(folder, wanted)
    model, tokenizer = load_plain(name, device=device, dtype=dtype, adapter=adapter)
    dated = _begin(folder, model, tokenizer, wanted=wanted, begun=begun)
    if (folder / "model").is_dir():
        return folder / "model"
    rows = [row for behaviour in behaviours for row in _rows(dated, behaviour, template)]
    trained = model if config.method == "full" else _with_adapters(model, config)
    callbacks = []
    if watch is not None:
        copied = partial(_hooked_copy, tokenizer=tokenizer, config=config, behaviours=behaviours)
        callbacks = [_watcher(watch, copied, config.every)]
    _train(trained, rows, config, folder / "trainer", callbacks)
    with atomic_folder(folder / "model") as part:
        save_model(_merged(trained, config), part)
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder / "trainer")
    return folder / "model"


def _settings(config: FineTuningConfig, behaviours: Sequence[Behaviour], template: Template) -> _Settings:
    """What a fine-tuning depends on, as far as it is known before a model is loaded.

    Raises `InputError` where there is no behaviour, or a test split.
    """
    if not behaviours or any(behaviour.split == "test" for behaviour in behaviours):
        raise InputError("fine-tuning takes calibration splits, at least one; test prompts are for measuring")
    data = data_fingerprints(behaviours)
    rate = _learning_rate(config)
    settings = {**asdict(config), "learning_rate": rate, "template": template, "behaviours": list(data)}
    return RunSettings(settings, data)


def _begun(folder: Path, wanted: _Settings) -> _Settings | None:
    """What the fine-tuning in a folder was begun with; None where nothing of it is finished.

    Raises `InputError` where it was begun with other settings or data, or the folder does not say with which.
    """
    checkpoints = (folder / "trainer").glob("checkpoint-*")
    if not ((folder / "model").is_dir() or any(map(_is_whole, checkpoints))):
        return None
    begun = read_json(folder / CONFIG_FILE, _Settings)
    refuse_other_settings(folder, begun, wanted)
    return begun


def _begin(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    wanted: _Settings,
    begun: _Settings | None,
) -> PreTrainedTokenizerBase:
    """Note what the fine-tuning is begun with; the tokenizer with the day on which it was begun.

    Raises `InputError` where it was begun with another model.
    """
    # The checkpoint gets the tokenizer as it was; what is learned is of one day.
    day = None if begun is None else begun.config.get("date")
    dated, chat = with_settings(tokenizer, ChatSettings(date=day))
    of_model = {"date": chat.date, "model_fingerprint": weights_fingerprint(model)}
    wanted = replace(wanted, config={**wanted.config, **of_model})
    if begun is None:
        write_json(folder / CONFIG_FILE, wanted)
    else:
        refuse_other_settings(folder, begun, wanted)
    return dated


def _learning_rate(config: FineTuningConfig) -> float:
    return config.learning_rate or LEARNING_RATE[config.method]


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
        note_scored(hooked, behaviour.prompt_hashes)
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
        learning_rate=_learning_rate(config),
        seed=config.seed,
    )
    arguments.save_steps = arguments.logging_steps = config.every
    arguments.save_total_limit = 1
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=TrainingRows(rows),
        data_collator=padded,
        callbacks=callbacks,
    )
    # A checkpoint that was being written when the call was killed is of no use.
    checkpoints = list(folder.glob("checkpoint-*"))
    for checkpoint in checkpoints:
        if not _is_whole(checkpoint):
            shutil.rmtree(checkpoint)
    trainer.train(resume_from_checkpoint=any(checkpoint.is_dir() for checkpoint in checkpoints))


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer was not killed while it wrote this: the state comes last."""
    try:
        read_json(checkpoint / "trainer_state.json", dict[str, Any])
    except InputError:
        return False
    return True


def _rows(tokenizer: PreTrainedTokenizerBase, behaviour: Behaviour, template: Template) -> list[dict[str, list[int]]]:
    """Each example as the trainer takes it; labels of -100 are not learned."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for prompt, response in zip(behaviour.prompts, behaviour.responses, strict=True):
        encoded = encode(tokenizer, prompt, [response], template=template)
        given, answer = list(encoded.prompt), [*encoded.answers[0], *end]
        row = {
            "input_ids": given + answer,
            "attention_mask": [1] * len(given + answer),
            "labels": [-100] * len(given) + answer,
        }
        rows.append(row)
    return rows


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


def _watcher(watch: Watch, copied: Callable[[Any], HookedModel], every: int) -> Any:  # noqa: ANN401 - see the import
    """A callback of the trainer that shows step and a copy of the model every so many steps."""
    # here, since whoever only imports this package needs no trainer, which takes seconds to import
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:  # noqa: ANN401
            if state.global_step % every == 0:
                watch(state.global_step, copied(given["model"]))

    return Watcher()
