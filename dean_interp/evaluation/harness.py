"""EleutherAI's lm-eval harness on a hooked model: any of its tasks, also while a selection is silenced.

The harness' own `HFLM` does the work, on the transformers model inside the bridge, whose modules carry the hooks; here
it is told where each pass's positions stand, so that ablations that act on some positions only know them.
"""

import difflib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from dean_interp.models.generate import cache_is_right
from dean_interp.models.load import HookedModel, native_tokenizer
from dean_interp.models.notes import TokenPositions
from dean_interp.models.positions import at_positions, while_generating
from dean_interp.statistics import Interval, clustered_interval


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, item by item."""

    task: str
    metric: str
    higher_is_better: bool
    values: Float[np.ndarray, " item"]
    items: tuple[str, ...]

    @property
    def interval(self) -> Interval:
        """Mean over the items, 95 %. Raises `InputError` for fewer than two."""
        return clustered_interval(self.values, self.items)


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

    An exported checkpoint is measured the same way: `run_harness(load_model(folder), tasks)`.

    Args:
        tasks: by the harness' names, or those of task files in `folder`.
        limit: items of each task, from its beginning; None takes all.
        folder: task files (yaml) of one's own.
        n_fewshot: solved examples before each item; None: as the task says.
        chat: put items into the model's chat template.
        seed: of everything that the harness draws.

    Raises:
        InputError: the harness is not installed, no such task, a task without a number an item, or a
            `HookedTransformer` (load the model as a bridge: same weights, same hook names).
    """
    if not tasks:
        raise InputError("name at least one task")
    try:
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError("tasks need lm-eval: pip install 'dean_interp[eval]'") from error
    if not adapter_of(model).wraps_checkpoint:
        raise InputError("lm-eval runs on a bridge: load_model(name) without hooked_transformer=True")
    with _quiet():
        manager = _manager(TaskManager, tasks, folder)
        found: Any = simple_evaluate(
            model=_hooked_lm(model, batch_size),
            tasks=list(tasks),
            num_fewshot=n_fewshot,
            task_manager=manager,
            limit=limit,
            apply_chat_template=chat,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    assert found is not None
    better: Mapping[str, Mapping[str, bool]] = found["higher_is_better"]
    results = [one for task, samples in found["samples"].items() for one in _results(task, samples, better[task])]
    if not results:
        raise InputError(f"{', '.join(tasks)}: no metric of these tasks is a number an item")
    return tuple(results)


def _manager(kind: Any, tasks: Sequence[str], folder: Path | None) -> Any:  # noqa: ANN401 - a class of the harness' own
    """Of one's own tasks alone where they are all that is asked for: finding the harness' thousands takes seconds."""
    path = str(folder) if folder else None
    own = kind(include_path=path, include_defaults=False) if folder else None
    if own and set(tasks) <= set(own.all_tasks):
        return own
    manager = kind(include_path=path)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=4)
        raise InputError(f"no task {unknown[0]!r}" + (f"; near names: {', '.join(near)}" if near else ""))
    return manager


def _results(task: str, samples: Sequence[Mapping[str, Any]], better: Mapping[str, bool]) -> Iterator[TaskResult]:
    """Metrics that are one number an item, filter by filter; corpus metrics are left out."""
    for name in dict.fromkeys(sample["filter"] for sample in samples):
        own = [sample for sample in samples if sample["filter"] == name]
        for metric in own[0]["metrics"]:
            values = [sample.get(metric) for sample in own]
            if all(isinstance(value, bool | int | float | np.number) for value in values):
                numbers = np.array(values, dtype=np.float64)
                label = metric if name == "none" else f"{metric} ({name})"
                yield TaskResult(
                    task, label, bool(better.get(metric, True)), numbers, tuple(str(sample["doc_id"]) for sample in own)
                )


def _hooked_lm(model: HookedModel, batch_size: int) -> Any:  # noqa: ANN401 - a class of the harness' own
    from lm_eval.models import huggingface

    harness: Any = huggingface.HFLM

    class HookedLM(harness):
        """HFLM on the model inside a bridge."""

        def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **options: Any) -> list[Any]:  # noqa: ANN401
            own = super()._loglikelihood_tokens(list(shard(requests)), *args, **options)
            return [tuple(one) for one in gather(own)]

        def generate_until(self, requests: list[Any], *args: Any, **options: Any) -> list[str]:  # noqa: ANN401
            return gather(super().generate_until(list(shard(requests)), *args, **options))

        def _model_call(self, inps: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401
            position = torch.arange(inps.shape[1], device=inps.device).expand(inps.shape)
            with at_positions(model, TokenPositions(position, torch.zeros_like(inps, dtype=torch.bool))):
                return super()._model_call(inps, *args, **options)

        def _model_generate(self, context: Tensor, *args: Any, **options: Any) -> Tensor:  # noqa: ANN401
            cached = cache_is_right(model)
            n_prompt = options["attention_mask"].sum(1)
            with while_generating(model, n_prompt, context.shape[1], cached=cached):
                return super()._model_generate(context, *args, **options, **({} if cached else {"use_cache": False}))

    return HookedLM(
        pretrained=model.original_model,
        tokenizer=native_tokenizer(model),
        backend="causal",
        batch_size=batch_size,
        max_length=model.cfg.n_ctx,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' own warnings, which are about its defaults and not about the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
