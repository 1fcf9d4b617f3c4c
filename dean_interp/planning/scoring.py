"""What scoring will take, before it is run: memory, time, and the batches that fit.

The model is there, so short passes are run and watched (`planning.probe`): how many bytes autograd keeps for rows of
two lengths, and how long a batch takes. `planning.study` says the same of a whole study, of a model that is not there.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dean_interp.data.examples import Behaviour
from dean_interp.distributed import n_here, n_processes, on_rank0
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.models.tokens import batches
from dean_interp.planning.memory import GIB, SHARE_OF_MEMORY, free_memory, halved, held_memory, largest_sums
from dean_interp.planning.probe import Probe, longest
from dean_interp.scoring.importance import (
    ScoringConfig,
    batch_tokens_of,
    give_back,
    in_passes,
    prepare,
    scored_sites,
    units_of,
)

_BATCH_TOKENS = (8192, 4096, 2048, 1024, 512, 256, 1)


@dataclass(frozen=True)
class Plan:
    """The cost of scoring one behaviour. Bytes on the device that scores; seconds on this machine."""

    batch_tokens: int
    """Number of padded tokens a batch."""
    layers_per_pass: int
    """Number of layers whose sums are held at once."""
    n_passes: int
    """Passes of scoring: more than one where the sums of all layers do not fit beside a batch."""
    n_examples: int
    n_tokens: int
    """Number of padded tokens that go through the model in each pass."""
    held_bytes: int
    """In use before scoring: on the CPU the whole process, on a GPU what torch has allocated."""
    sums_bytes: int
    """Running sums of one pass."""
    batch_bytes: int
    """What the largest batch needs beside them."""
    peak_bytes: int
    """The most at once: in use, sums and a batch."""
    free_bytes: int
    """What could still be allocated before scoring."""
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak stays within what is free."""
        return self.peak_bytes - self.held_bytes <= SHARE_OF_MEMORY * self.free_bytes

    def apply(self, config: ScoringConfig) -> ScoringConfig:
        """The same settings with this plan's batches and passes."""
        return dataclasses.replace(config, batch_tokens=self.batch_tokens, layers_per_pass=self.layers_per_pass)

    def __str__(self) -> str:
        return (
            f"{self.n_examples} examples, {self.n_tokens} padded tokens in batches of {self.batch_tokens}; "
            f"{self.n_passes} pass(es) of {self.layers_per_pass} layers; about {self.seconds:.0f} s; "
            f"peak {self.peak_bytes / GIB:.2f} GiB ({self.held_bytes / GIB:.2f} in use, {self.sums_bytes / GIB:.2f} "
            f"sums, {self.batch_bytes / GIB:.2f} a batch; {self.free_bytes / GIB:.2f} free)"
        )


def plan(
    model: HookedModel,
    behaviour: Behaviour,
    *,
    unit: Unit | Sequence[Unit] = "neuron",
    config: ScoringConfig = ScoringConfig(),  # noqa: B008 - frozen
    free_bytes: int | None = None,
) -> Plan:
    """Predict what `importance` will take, and choose batches and layers a pass that fit.

    Batches are `config.batch_tokens` where that fits and smaller where it does not; sums of all layers are held at once
    where they fit, else as many layers' as do, in as many passes. Of several processes the first one plans for all.

    Args:
        free_bytes: memory that may be used beside what is held; None: what the device has free now.

    Raises:
        InputError: as `importance`, and where not even one example and one layer fit.
    """
    return Plan(
        **on_rank0(
            lambda: dataclasses.asdict(
                _planned(model=model, behaviour=behaviour, unit=units_of(unit), config=config, free_bytes=free_bytes)
            )
        )
    )


def _planned(
    model: HookedModel, behaviour: Behaviour, unit: Sequence[Unit], config: ScoringConfig, free_bytes: int | None
) -> Plan:
    """The first plan that fits, of those with the most layers a pass and the largest batches."""
    sites = scored_sites(model, unit, config)
    data = prepare(model, behaviour, config)
    device = torch.device(model.cfg.device)
    probe = Probe(model, data, sites, config)
    bytes_of_batch = probe.batch_bytes()
    give_back()
    free = free_bytes if free_bytes is not None else _free_for_each_process(device)
    held = held_memory(device)
    sums = largest = 0
    for layers in halved(config.layers_per_pass or model.cfg.n_layers):
        passes = in_passes(sites, layers)
        sums = largest_sums(model, passes, len(behaviour), offloaded=False)
        for batch_tokens in _batch_sizes(model, config):
            planned = batches(data.rows, batch_tokens=batch_tokens, together=data.rows_each)
            sizes = [(len(batch), longest(batch)) for batch in planned]
            largest = max(bytes_of_batch(n_rows, length) for n_rows, length in sizes)
            if sums + largest > SHARE_OF_MEMORY * free:
                continue
            n_tokens = sum(n_rows * length for n_rows, length in sizes)
            seconds = len(passes) * n_tokens * probe.seconds_a_token(planned[0]) / n_processes()
            give_back()
            return Plan(
                batch_tokens=batch_tokens,
                layers_per_pass=layers,
                n_passes=len(passes),
                n_examples=len(behaviour),
                n_tokens=n_tokens,
                held_bytes=held,
                sums_bytes=sums,
                batch_bytes=largest,
                peak_bytes=held + sums + largest,
                free_bytes=free,
                seconds=seconds,
            )
    raise InputError(
        f"one layer's sums ({sums / GIB:.2f} GiB) and one example ({largest / GIB:.2f} GiB) do not fit into "
        f"{SHARE_OF_MEMORY:.0%} of the {free / GIB:.2f} GiB that are free: use a smaller dtype, max_tokens or "
        "more memory"
    )


def _free_for_each_process(device: torch.device) -> int:
    """Bytes that can still be allocated; the processes of one machine share its memory."""
    n_sharing = n_here() if device.type == "cpu" else 1
    return free_memory(device) // n_sharing


def _batch_sizes(model: HookedModel, config: ScoringConfig) -> list[int]:
    """Tokens a batch that are tried: as many as are wanted, then fewer."""
    wanted = batch_tokens_of(model, config)
    return [wanted, *(n for n in _BATCH_TOKENS if n < wanted)]
