"""EleutherAI's lm-eval harness on a hooked model: any of its tasks, also while a selection is silenced.

The harness' own `HFLM` runs the transformers model inside the bridge, whose modules carry the hooks. Here it is told
where the positions of each pass stand, so that an ablation of some positions finds them. An exported checkpoint is
measured in the same way: `run_harness(load_model(folder), tasks)`.
"""

import difflib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.distributed import gather, shard
from dean_interp.errors import InputError
from dean_interp.models.adapters import adapter_of
from dean_interp.models.cache_check import cache_is_right
from dean_interp.models.greedy import greedy_settings, without_its_settings
from dean_interp.models.load import HookedModel
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.notes import TokenPositions
from dean_interp.models.positions import at_positions, while_generating
from dean_interp.models.templates import appended, rendered_chat
from dean_interp.progress import redraws
from dean_interp.statistics import Interval, clustered_interval


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, with a value for each item."""

    task: str
    metric: str
    higher_is_better: bool
    values: Float[np.ndarray, " item"]
    items: tuple[str, ...]

    @property
    def interval(self) -> Interval:
        """Mean over the items, 95 %. Raises `InputError` for fewer than two."""
        return clustered_interval(self.values, self.items)


def task_files_fingerprint(folder: Path | None) -> str:
    """Hash of the files in a folder of tasks of one's own: a task that was corrected is another one."""
    digest = hashlib.sha256()
    if folder is None:
        return ""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_harness(
    model: HookedModel,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: Path | None = None,
    n_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> tuple[TaskResult, ...]:
    """Run tasks on the model's present state (inside `ablate`: on the ablated model).

    Args:
        tasks: names of the harness, or of task files in `folder`.
        limit: items of each task, from its beginning; None takes all.
        folder: task files (yaml) of one's own.
        n_fewshot: solved examples before each item; None: as the task says.
        chat: put items into the model's chat template.
        seed: seed for everything that the harness draws.

    Raises:
        InputError: lm-eval is not installed, no such task, a task without a number an item, or a `HookedTransformer`.
    """
    if not tasks:
        raise InputError("name at least one task")
    simple_evaluate, task_manager_class = _lm_eval()
    if not adapter_of(model).wraps_checkpoint:
        raise InputError("lm-eval runs on a bridge: load_model(name) without hooked_transformer=True")
    # the harness' own warnings are about its defaults, not about the model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluated = simple_evaluate(
            model=_hooked_lm(model, batch_size),
            tasks=list(tasks),
            num_fewshot=n_fewshot,
            task_manager=_task_manager(task_manager_class, tasks, folder),
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    results = _results(evaluated)
    if not results:
        raise InputError(f"{', '.join(tasks)}: no metric of these tasks is a number an item")
    return tuple(results)


def refuse_unknown_tasks(tasks: Sequence[str], folder: Path | None = None) -> None:
    """Raise `InputError` where a task does not exist, or lm-eval is not installed; `run_harness` would say so later.

    Args:
        tasks: names of the harness, or of task files in `folder`.
        folder: task files of one's own.
    """
    if tasks:
        _, task_manager_class = _lm_eval()
        _task_manager(task_manager_class, tasks, folder)


def _lm_eval() -> tuple[Any, Any]:
    """The harness' function that evaluates, and its class that finds tasks; an error where it is not installed."""
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("tasks need lm-eval: pip install 'dean_interp[eval]'") from error
    return simple_evaluate, TaskManager


def _task_manager(task_manager_class: Any, tasks: Sequence[str], folder: Path | None) -> Any:  # noqa: ANN401 - lm-eval's
    path = str(folder) if folder else None
    # finding the harness' thousands of tasks takes seconds: they are left out where the folder has what is asked for
    if folder:
        from_folder = task_manager_class(include_path=path, include_defaults=False)
        if set(tasks) <= set(from_folder.all_tasks):
            return from_folder
    manager = task_manager_class(include_path=path)
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, n=4)
            hint = f"; near names: {', '.join(near)}" if near else ""
            raise InputError(f"no task {task!r}{hint}")
    return manager


def _results(evaluated: Mapping[str, Any]) -> list[TaskResult]:
    """The results of all tasks, from what the harness returned."""
    results = []
    for task, samples in evaluated["samples"].items():
        better = evaluated["higher_is_better"][task]
        results += _task_results(task, samples, better)
    return results


def _task_results(task: str, samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool]) -> list[TaskResult]:
    """Metrics that are one number an item, filter by filter; corpus metrics are left out."""
    results = []
    filter_names = dict.fromkeys(sample["filter"] for sample in samples)
    for filter_name in filter_names:
        filtered = [sample for sample in samples if sample["filter"] == filter_name]
        items = tuple(str(sample["doc_id"]) for sample in filtered)
        for metric in filtered[0]["metrics"]:
            values = [sample.get(metric) for sample in filtered]
            is_numeric = all(isinstance(value, bool | int | float | np.number) for value in values)
            if not is_numeric:
                continue
            result = TaskResult(
                task=task,
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                higher_is_better=bool(better.get(metric, True)),
                values=np.array(values, dtype=np.float64),
                items=items,
            )
            results.append(result)
    return results


def _hooked_lm(model: HookedModel, batch_size: int) -> Any:  # noqa: ANN401 - a class of the harness' own
    from lm_eval.models import huggingface

    harness = _with_text_as_given(huggingface.HFLM, appended(native_tokenizer(model)))

    class HookedLM(harness):
        """HFLM on the model inside a bridge."""

        # each rank computes its shard of the requests; in a log file the harness' bars, which redraw, are off

        def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **options: Any) -> list[Any]:  # noqa: ANN401
            quiet = disable_tqdm or not redraws()
            own_requests = list(shard(requests))
            answers = super()._loglikelihood_tokens(own_requests, disable_tqdm=quiet, **options)
            return [tuple(answer) for answer in gather(answers)]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            quiet = disable_tqdm or not redraws()
            own_requests = list(shard(requests))
            return gather(super().generate_until(own_requests, disable_tqdm=quiet))

        def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401
            position = torch.arange(inps.shape[1], device=inps.device).expand(inps.shape)
            is_answer = torch.zeros_like(inps, dtype=torch.bool)
            with at_positions(model, TokenPositions(position, is_answer)):
                return super()._model_call(inps, *args, **options)

        def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:  # noqa: ANN401
            # Greedy, or as the task says; of the checkpoint's own settings only what ends a turn. `HFLM` leaves the
            # others to transformers, which takes them from the checkpoint.
            n_rows, n_tokens = context.shape
            cached = cache_is_right(model)
            ends = adapter_of(model).end_tokens(self.tokenizer)
            settings = greedy_settings(ends, cached=cached)
            settings.update(**_sampled(options), max_length=max_length, return_dict_in_generate=False)
            stopping = huggingface.stop_sequences_criteria(self.tokenizer, stop, n_tokens, n_rows)
            real = options["attention_mask"]
            positions = while_generating(model, real.sum(1), n_tokens, cached=cached)
            with positions, without_its_settings(self.model):
                return self.model.generate(
                    context, generation_config=settings, attention_mask=real, stopping_criteria=stopping
                )

    return HookedLM(
        pretrained=model.original_model,
        tokenizer=native_tokenizer(model),
        backend="causal",
        batch_size=batch_size,
        max_length=model.cfg.n_ctx,
    )


def _sampled(options: Mapping[str, Any]) -> dict[str, Any]:
    """A task's own settings of generation, which sample where it sets a temperature and does not say otherwise."""
    settings = {name: value for name, value in options.items() if name != "attention_mask"}
    temperature = settings.pop("temperature", 0.0)
    if settings.setdefault("do_sample", temperature > 0):
        settings["temperature"] = temperature or 1.0
    return settings


def _with_text_as_given(harness: Any, last: list[int]) -> Any:  # noqa: ANN401 - classes of the harness' own
    """HFLM that renders chats as all else does, and ends no text that something may follow in tokens of its own.

    Args:
        last: the tokens that the tokenizer puts behind every text.
    """

    class TextLM(harness):
        """HFLM whose tokens are those of the text that was given."""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return rendered_chat(self.tokenizer, chat_history, generation_prompt=add_generation_prompt)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None
        ) -> list[int]:
            ids = super().tok_encode(string, add_special_tokens=add_special_tokens)
            without_special = super().tok_encode(string, add_special_tokens=False)
            is_added = len(ids) > len(without_special)
            if is_added:
                ids = ids[: len(ids) - len(last)]
            return ids[-left_truncate_len:] if left_truncate_len else ids

        def tok_batch_encode(self, strings: Sequence[str], **options: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
            ids, real = super().tok_batch_encode(strings, **options)
            n_kept = ids.shape[1] - len(last)
            # padding is on the left
            ends = ids[:, n_kept:].tolist()
            is_added = bool(last) and ends == [last] * len(ids)
            if not is_added:
                return ids, real
            return ids[:, :n_kept], real[:, :n_kept]

    return TextLM
