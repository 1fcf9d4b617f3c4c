"""How fast this machine is with a model's shapes: a few passes through shallow models, timed in seconds.

A study's passes are those of `measure`, of scoring and of answering. Each kind is run here on batches of several sizes
through a model of one layer and a model of three, whose layers are the real ones' shapes. What a layer adds, and what
is done once, is fitted to these times (`planning.rates`). Rounds are interleaved, and every round is fitted alone, too:
their range says how sure the forecast is.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial

import psutil
import torch

from dean_interp.data.examples import load_behaviour
from dean_interp.models.adapters import adapter_of
from dean_interp.models.generate import generate
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.loss import answer_log_probs
from dean_interp.models.matrices import neuron_sites, weight_sites
from dean_interp.models.sites import Site
from dean_interp.models.sizes import vocabulary_size
from dean_interp.models.tokens import Branch, Row, collate
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.models.unhooked import unhooked
from dean_interp.planning.amounts import Amount, PassKind, amount_of_batch
from dean_interp.planning.rates import Rates, TimedPass, fitted
from dean_interp.planning.shallow import shallow_model
from dean_interp.planning.stopwatch import TimedRun, timed
from dean_interp.scoring.importance import gradient_step
from dean_interp.scoring.sums import Sums

DEPTHS = (1, 3)
"""Layers of the models that are timed."""
N_ROUNDS = 3
MEASURED = ((2, 32, 4), (8, 64, 16), (2, 256, 16), (4, 256, 8))
SCORED = ((2, 32, 8), (4, 64, 8), (8, 64, 16), (2, 256, 16))
"""Rows, their length and the answer tokens of a row, for each batch that is timed."""
ANSWERED = (8, 32)
"""Prompts of a batch that is answered."""
FEW, MANY = 1, 9
"""New tokens: what the later ones take is the difference."""


LARGEST_SPREAD = 0.25
"""Largest difference between two rounds, as a share of their median, on a machine that does nothing else."""


@dataclass(frozen=True)
class Calibration:
    """What passes of one kind take here."""

    rates: Rates
    """From the median time of each sample."""
    rounds: tuple[Rates, ...]
    """The same from each round alone."""
    load: float
    """Number of processes that wanted a core before it began, the average of a minute."""
    n_cores: int
    spread: float
    """Difference between the slowest and the fastest round, as a share of the median."""
    made: str
    """The day it was made."""

    @property
    def busy(self) -> str:
        """Why the machine seems to have done other work; empty where it does not."""
        if self.load > self.n_cores:
            return f"{self.load:.1f} processes wanted its {self.n_cores} cores"
        if self.spread > LARGEST_SPREAD:
            return f"times of {len(self.rounds)} rounds differed by {self.spread:.0%}"
        return ""


@dataclass(frozen=True)
class Sample:
    """One thing that is timed, once a round."""

    n_layers: int
    amount: Amount
    runs: tuple[TimedRun, ...]
    """One call; or two, of which the first takes longer, and their difference counts."""


@own_torch_settings()
def calibrated(shape: HookedModel, kind: PassKind, *, device: str) -> Calibration:
    """Time one kind of pass.

    Args:
        shape: the model, with or without its weights.
        kind: what is timed.
        device: the device that computes.
    """
    load, n_cores = load_of_machine()
    samples = []
    for n_layers in DEPTHS:
        model = shallow_model(shape, n_layers, device=device)
        samples += _answering(model) if kind == "answer" else _passes(model, kind)
    # The first round sets up what is set up once.
    _round(samples, device)
    rounds = [_round(samples, device) for _ in range(N_ROUNDS)]
    # One fit to the median of each sample, and one to each round.
    medians = [statistics.median(of_sample) for of_sample in zip(*rounds, strict=True)]
    rates = []
    for seconds in (medians, *rounds):
        passes = _timed_passes(samples, seconds)
        rates.append(fitted(passes, len(shape.blocks), by_row=kind == "weights"))
    of_medians, *of_rounds = rates
    totals = sorted(map(sum, rounds))
    difference = totals[-1] - totals[0]
    return Calibration(
        rates=of_medians,
        rounds=tuple(of_rounds),
        load=load,
        n_cores=n_cores,
        spread=difference / statistics.median(totals),
        made=date.today().isoformat(),
    )


def load_of_machine() -> tuple[float, int]:
    """How many processes want a core, the average of a minute, and how many cores there are."""
    # Unlike that of `os`, it is there on every system.
    load, _, _ = psutil.getloadavg()
    # Linux says which cores this process may use.
    if hasattr(os, "sched_getaffinity"):
        return load, len(os.sched_getaffinity(0))
    return load, os.cpu_count() or 1


def _round(samples: Sequence[Sample], device: str) -> list[float]:
    return [_seconds(sample, device) for sample in samples]


def _timed_passes(samples: Sequence[Sample], seconds: Sequence[float]) -> list[TimedPass]:
    passes = []
    for sample, of_sample in zip(samples, seconds, strict=True):
        timed_pass = TimedPass(n_layers=sample.n_layers, amount=sample.amount, seconds=of_sample)
        passes.append(timed_pass)
    return passes


def _seconds(sample: Sample, device: str) -> float:
    """The time of a sample; a difference is at least a millisecond, since noise can turn it round."""
    first, *others = [timed(run, device=device).better for run in sample.runs]
    least = 1e-3 if others else 1e-6
    return max(first - sum(others), least)


def _passes(model: HookedModel, kind: PassKind) -> list[Sample]:
    """Batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    if kind == "forward":
        run, shapes = _measure, MEASURED
        is_branched = adapter_of(model).rows_may_branch
    else:
        run, shapes = _score, SCORED
        is_branched = False
    sites = neuron_sites(model)
    if kind == "weights":
        sites = sites + weight_sites(model)
    d_vocab = vocabulary_size(model)
    samples = []
    for n_rows, length, n_answer in shapes:
        ids = torch.randint(d_vocab, (n_rows, length), generator=generator)
        rows = [_row(number, tokens, n_answer, is_branched) for number, tokens in enumerate(ids.tolist())]
        sample = Sample(len(model.blocks), amount_of_batch(rows), (run(model, rows, sites),))
        samples.append(sample)
    return samples


def _row(number: int, tokens: Sequence[int], n_answer: int, is_branched: bool) -> Row:
    """A prompt with one answer; branched, with two halves of one that grow from the prompt."""
    prompt = Branch(tuple(tokens[:-n_answer]), prompt=number)
    answer = tuple(tokens[-n_answer:])
    if not is_branched:
        return (prompt, Branch(answer, parent=0, answer=number))
    half = n_answer // 2
    return (
        prompt,
        Branch(answer[:half], parent=0, answer=2 * number),
        Branch(answer[half:], parent=0, answer=2 * number + 1),
    )


def _measure(model: HookedModel, rows: Sequence[Row], sites: Sequence[Site]) -> TimedRun:
    """A forward pass as `measure` makes it."""

    def run() -> None:
        with torch.inference_mode(), unhooked(model):
            batch = collate(rows, device=model.cfg.device)
            answer_log_probs(model, batch)

    return run


def _score(model: HookedModel, rows: Sequence[Row], sites: Sequence[Site]) -> TimedRun:
    """A pass forward and back as `importance` makes it."""
    sums = Sums(model, sites, groups=torch.arange(len(rows)), rows_each=1, folds=("size",))

    def run() -> None:
        batch = collate(rows, device=model.cfg.device)
        sums.begin(batch)
        gradient_step(model, batch, sites, sums)

    return run


def _answering(model: HookedModel) -> list[Sample]:
    """Batches of prompts, answered with many new tokens and with few."""
    texts = load_behaviour("general", n_examples=max(ANSWERED)).prompts
    n_steps = MANY - FEW
    samples = []
    for n_rows in ANSWERED:
        run = partial(generate, model, texts[:n_rows], template="raw", batch_size=n_rows)
        n_tokens = n_steps * n_rows
        sample = Sample(
            n_layers=len(model.blocks),
            amount=Amount(n_calls=n_steps, n_tokens=n_tokens, n_logits=n_tokens),
            runs=(partial(run, max_new_tokens=MANY), partial(run, max_new_tokens=FEW)),
        )
        samples.append(sample)
    return samples
