"""What the pages of a run's strongest units show: each unit by itself, and the edges between them on a few prompts.

The prompts are the first test prompts of each behaviour: nobody chooses them by what they show.
Each record is a file that appears whole, with the fingerprint of everything that it depends on. One that is there under
the same fingerprint is not made again, so a killed call goes on where it was.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dean_interp.circuits.graph import Circuit
from dean_interp.circuits.neuron_view import NeuronView, neuron_readings, view_of_reading
from dean_interp.circuits.trace import trace_links
from dean_interp.data.examples import Behaviour
from dean_interp.distributed import require_one_process
from dean_interp.errors import InputError, refuse_below
from dean_interp.files import read_json, write_json
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.neuron_names import Neuron
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.sizes import neuron_shapes
from dean_interp.progress import progress_bar
from dean_interp.resume import Unfinished, discard
from dean_interp.selection.selection import Selection
from dean_interp.study.run_folder import locked
from dean_interp.study.run_units import RunUnits, units_of_run
from dean_interp.study.store import fingerprint_of

log = logging.getLogger(__name__)

RECORDS = "records"
"""The folder of the records, in that of the pages."""
_VERSION = "2"
"""The version of what records hold: another one makes all of them anew."""


@dataclass(frozen=True)
class PagesConfig:
    """How many units get a page, and on how many prompts they are looked at."""

    n_units: int = 30
    """Number of units that get a page: the strongest of the run, fewer where it has fewer."""
    n_prompts: int = 8
    """Number of test prompts of each behaviour on which units are read and measured: the first ones."""
    n_traced: int = 2
    """Number of test prompts of each of the two behaviours on which edges between units are traced: the first ones."""
    n_sources: int = 4
    """Number of edges into each unit that are kept on each prompt: the largest from other units."""
    n_checked: int = 16
    """Number of largest edges to the margin, and of largest edges between units, that are measured by intervention on
    each prompt, beside as many random edges."""
    n_texts: int = 8
    """Number of texts on a unit's page: those on which it fires most."""
    answer_tokens: int | None = 12
    """Number of first tokens of each answer that are measured (None: all)."""

    def check(self) -> None:
        """Raise `InputError` where a number is below 1, or more prompts are to be traced than read."""
        refuse_below(self, dict.fromkeys(vars(self), 1))
        if self.n_traced > self.n_prompts:
            raise InputError(f"n_traced must be at most n_prompts ({self.n_prompts}), got {self.n_traced}")


@dataclass(frozen=True)
class UnitRecord:
    """One unit by itself."""

    fingerprint: str
    view: NeuronView


@dataclass(frozen=True)
class CircuitRecord:
    """The edges between all units on one prompt."""

    fingerprint: str
    behaviour: str
    place: int
    """1 for the first behaviour, 2 for the second."""
    number: int
    """The number of the test prompt of the behaviour, from 1."""
    prompt: str
    circuit: Circuit


@dataclass(frozen=True)
class SiteRecords:
    """Everything that the pages of a run show."""

    run: RunUnits
    views: tuple[NeuronView, ...]
    """In the order of the run's units."""
    circuits: tuple[CircuitRecord, ...]
    """Those of first, then those of second."""


def site_records(run_folder: Path, out: Path, config: PagesConfig, *, device: str | None = None) -> SiteRecords:
    """The records of the pages of a finished run. What is not in `out` yet is made and written there.

    Args:
        run_folder: that of `run` or `improve`.
        out: the folder of the pages.
        config: how many units and prompts.
        device: where the model runs; None as `load_model` chooses.

    Raises:
        InputError: as `units_of_run`; a setting out of its range; a model that is not the run's any more, or that is
            offloaded; a folder that another process writes to; several processes.
    """
    require_one_process("pages")
    config.check()
    run = units_of_run(run_folder, n_units=config.n_units)
    first_prompts = [replace(test, examples=test.examples[: config.n_prompts]) for test in run.tests]
    model_config = replace(run.model, device=device)
    run = replace(run, model=model_config, tests=tuple(first_prompts))
    folder = out / RECORDS
    with locked(folder):
        units = _unit_files(run, folder, config)
        circuits = _circuit_files(run, folder, config)
        if not all(file.is_made for file in (*units, *circuits)):
            model = _model_of(run)
            _view_units(model, run, units, config)
            _trace_prompts(model, run, circuits, config)
        # A killed call left it, even where it had made every record.
        discard(_unfinished_path(folder))
        views = [read_json(file.path, UnitRecord).view for file in units]
        traced = [read_json(file.path, CircuitRecord) for file in circuits]
        return SiteRecords(run=run, views=tuple(views), circuits=tuple(traced))


@dataclass(frozen=True)
class _RecordFile:
    """The file of a record, and the fingerprint that it must have."""

    path: Path
    fingerprint: str

    @property
    def is_made(self) -> bool:
        """Whether the file is there and whole, under this fingerprint."""
        try:
            return read_json(self.path, _Fingerprint).fingerprint == self.fingerprint
        except InputError:
            return False


def _record_file(path: Path, fingerprint: str) -> _RecordFile:
    """The file of a record. One that is damaged is made anew, since pages hold nothing that their run does not."""
    if path.is_file():
        try:
            read_json(path, _Fingerprint)
        except InputError as error:
            log.warning("made anew: %s", error)
    return _RecordFile(path, fingerprint)


@dataclass(frozen=True)
class _Fingerprint:
    """What is looked at of a record's file."""

    fingerprint: str


def _unit_files(run: RunUnits, folder: Path, config: PagesConfig) -> list[_RecordFile]:
    """One a unit. It depends on no other unit: more units leave those that are made."""
    parts = _shared_parts(run, config)
    parts.append(str(config.n_texts))
    parts += [scores.fingerprint for scores in run.scores]
    files = []
    for unit in run.units:
        fingerprint = fingerprint_of(unit.name, *parts)
        files.append(_record_file(folder / f"{unit.name}.json", fingerprint))
    return files


def _circuit_files(run: RunUnits, folder: Path, config: PagesConfig) -> list[_RecordFile]:
    """One a traced prompt."""
    parts = [*_shared_parts(run, config), str(config.n_sources), str(config.n_checked)]
    parts += [unit.name for unit in run.units]
    files = []
    for behaviour, number in _traced(run, config):
        place = 1 + run.behaviours.index(behaviour.name)
        fingerprint = fingerprint_of(behaviour.name, str(number), *parts)
        files.append(_record_file(folder / f"circuit.{place}.{number}.json", fingerprint))
    return files


def _shared_parts(run: RunUnits, config: PagesConfig) -> list[str]:
    """What every record depends on."""
    settings = [run.model.template, str(run.model.date), str(run.model.thinking), str(config.answer_tokens)]
    tests = [test.fingerprint for test in run.tests]
    return [_VERSION, run.model_fingerprint, *settings, *tests]


def _traced(run: RunUnits, config: PagesConfig) -> list[tuple[Behaviour, int]]:
    """The first prompts of the two behaviours, each as a behaviour and a number from 1."""
    traced = []
    for behaviour in run.tests[:2]:
        for number in range(1, min(config.n_traced, len(behaviour)) + 1):
            traced.append((behaviour, number))
    return traced


def _model_of(run: RunUnits) -> HookedModel:
    """The run's model. Raises `InputError` where it is another one by now, or offloaded."""
    model = run.model.load()
    refuse_offloaded(model, "a page of a unit")
    if model_fingerprint(model) != run.model_fingerprint:
        raise InputError(f"the weights of {run.model.name} are not those that the run was made with: run it anew")
    return model


def _view_units(model: HookedModel, run: RunUnits, files: Sequence[_RecordFile], config: PagesConfig) -> None:
    """Read all units in one pass, then silence each of those that have no record yet."""
    missing = [place for place, file in enumerate(files) if not file.is_made]
    if not missing:
        return
    # All units are read, those with a record too: what a killed call read is then good for the next one.
    folder = files[0].path.parent
    key = fingerprint_of(*(file.fingerprint for file in files))
    unfinished = Unfinished(_unfinished_path(folder), key)
    readings = neuron_readings(
        model,
        run.neurons,
        run.tests,
        template=run.model.template,
        answer_tokens=config.answer_tokens,
        unfinished=unfinished,
    )
    n_made = len(files) - len(missing)
    with progress_bar(total=len(files), initial=n_made, desc="units", unit="unit") as progress:
        for place in missing:
            file = files[place]
            view = view_of_reading(model, readings, place, scores=run.scores, n_texts=config.n_texts)
            write_json(file.path, UnitRecord(file.fingerprint, view))
            progress.update()


def _trace_prompts(model: HookedModel, run: RunUnits, files: Sequence[_RecordFile], config: PagesConfig) -> None:
    """Trace the edges between all units on every prompt that has no record yet."""
    selection = _selection_of(model, run.neurons)
    traced = list(zip(_traced(run, config), files, strict=True))
    for (behaviour, number), file in progress_bar(traced, desc="edges between units", unit="prompt"):
        if file.is_made:
            continue
        example = behaviour.examples[number - 1]
        circuit = trace_links(
            model,
            selection,
            example,
            n_sources=config.n_sources,
            n_checked=config.n_checked,
            answer_tokens=config.answer_tokens,
            template=run.model.template,
        )
        record = CircuitRecord(
            fingerprint=file.fingerprint,
            behaviour=behaviour.name,
            place=1 + run.behaviours.index(behaviour.name),
            number=number,
            prompt=example.prompt,
            circuit=circuit,
        )
        write_json(file.path, record)


def _selection_of(model: HookedModel, neurons: Sequence[Neuron]) -> Selection:
    shapes = neuron_shapes(model)
    indices: dict[Site, list[int]] = {site: [] for site in shapes}
    for site, index in neurons:
        indices[site].append(index)
    units = {}
    for site, of_site in indices.items():
        units[site] = torch.tensor(sorted(of_site), dtype=torch.int64)
    return Selection(units, shapes)


def _unfinished_path(folder: Path) -> Path:
    return folder / "texts.unfinished"
