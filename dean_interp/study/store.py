"""The one store: a state of the model is measured once and kept in a folder, so that a killed run goes on where it was.

Nothing is measured before it is asked for, and what a state is compared with is handed in.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from pydantic import TypeAdapter

from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.editing.value_names import value_fingerprint
from dean_interp.editing.values import Value, Zero
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import measure
from dean_interp.evaluation.measurement import Measurement
from dean_interp.files import write_json
from dean_interp.information.activations import Activations, read_activations
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Unit
from dean_interp.models.tokens import Template
from dean_interp.resume import Unfinished, read_kept
from dean_interp.selection.selection import Selection
from dean_interp.study.measurement_file import load_activations, load_measurement, save_activations, save_measurement
from dean_interp.study.settings import DataConfig

KeptRecord = TypeVar("KeptRecord")


@runtime_checkable
class ModelChange(Protocol):
    """A change of the model that is no ablation of units: a system prompt, a steering vector, an adapter."""

    @property
    def fingerprint(self) -> str:
        """Says what is changed, and how much: two changes that are alike have the same."""
        ...

    def applied(self, model: HookedModel) -> AbstractContextManager[None]:
        """While open, the model is changed; afterwards it is as it was, to the bit."""
        ...


@dataclass(frozen=True)
class State:
    """The model as it is measured: original, edited, or under a control."""

    name: str
    kind: str
    """`original`, `edit`, a kind of control (`study.controls`), or `arm`."""
    ablated: Selection | None = None
    """The units that are silenced; None: none."""
    value: Value = Zero()  # noqa: RUF009 - frozen
    """What takes their place."""
    unit: Unit | None = None
    """The kind of unit of the edit that this state belongs to; None for the original and for arms."""
    growth: float = 1.0
    """Size relative to the edit, for random controls."""
    model: str = ""
    """Another model than the studied one (fine-tuned, quantised), by a name of its own."""
    change: ModelChange | None = None
    """What is changed beside the ablated units; None: nothing."""

    @property
    def title(self) -> str:
        """Unit and name: what names its files."""
        return f"{self.unit} {self.name}" if self.unit else self.name

    @property
    def n_units(self) -> int:
        """How many units are silenced."""
        return 0 if self.ablated is None else len(self.ablated)

    @property
    def fingerprint(self) -> str:
        """What is changed in the studied model; empty for the original."""
        parts = [self.model] if self.model else []
        if self.ablated is not None:
            parts.append(self.ablated.fingerprint)
            if not isinstance(self.value, Zero):
                parts.append(value_fingerprint(self.value))
        if self.change is not None:
            parts.append(self.change.fingerprint)
        return " ".join(parts)

    @contextmanager
    def applied(self, model: HookedModel) -> Iterator[None]:
        """While open, the model is in this state."""
        with ExitStack() as changes:
            if self.change is not None:
                changes.enter_context(self.change.applied(model))
            if self.ablated is not None:
                changes.enter_context(ablate(model, self.ablated, value=self.value))
            yield


ORIGINAL = State("original", "original")


@dataclass(frozen=True)
class Store:
    """What was measured of each state, as files in a folder."""

    folder: Path
    fingerprint: str
    """Hash of model, data and settings (`fingerprint_of`): files of anything else are refused."""
    tests: Sequence[Behaviour]
    """First, second and general."""
    config: DataConfig
    template: Template
    neurons: Selection | None = None
    """Neurons whose activations at the ends of prompts and answers are kept with each state."""
    others: Sequence[Behaviour] = ()
    """Further behaviours with two answers, which are measured in some states only (`further`)."""

    def measurement(
        self, model: HookedModel | None, state: State, *, reference: Measurement | None = None
    ) -> Measurement:
        """Every test in one state: from its files, else measured and written there.

        Args:
            model: None where the state is known to be there (`holds`).
            reference: the measurement of the original, to which KL on general text is taken; None: it is not taken.
        """
        general = self.general(model, state, reference=reference)
        path = self._path(state)
        # KL is taken on general text alone.
        both = self._kept(path, model, state=state, tests=self.tests[:2], reference=None, neurons=self.neurons)
        return Measurement({**both.behaviours, **general.behaviours}, both.activations)

    def general(self, model: HookedModel | None, state: State, *, reference: Measurement | None = None) -> Measurement:
        """General text in one state.

        Its files are named by what is ablated and lie apart: a control's KL is known before its margins are, and equal
        states share it.
        """
        folder = self.folder / "states" / self.tests[2].name
        name = state.fingerprint or ORIGINAL.name
        path = folder / f"{file_name(name)}.safetensors"
        return self._kept(path, model, state=state, tests=self.tests[2:], reference=reference, neurons=None)

    def further(self, model: HookedModel | None, state: State) -> Measurement:
        """The further behaviours in one state. Their files lie apart."""
        return self._kept(
            self._path_of_further(state), model, state=state, tests=self.others, reference=None, neurons=None
        )

    def holds(self, state: State) -> bool:
        """Whether the state was measured."""
        return self._path(state).is_file()

    def holds_further(self, state: State) -> bool:
        """Whether the further behaviours were measured in the state."""
        return self._path_of_further(state).is_file()

    def calibration(self, model: HookedModel, behaviours: Sequence[Behaviour]) -> Activations | None:
        """Activations of the original on both behaviours' calibration answers, for probes; None where not all have two
        answers, or no neurons are kept.
        """
        if self.neurons is None or not all(behaviour.paired for behaviour in behaviours):
            return None
        path = self.folder / "states" / "calibration" / "activations.safetensors"
        unfinished = Unfinished(path.with_suffix(".unfinished"), self.fingerprint)
        if not path.is_file():
            activations = read_activations(
                model,
                behaviours,
                self.neurons,
                answers=True,
                template=self.template,
                answer_tokens=self.config.answer_tokens,
                batch_tokens=self.config.measure_tokens,
                unfinished=unfinished,
            )
            save_activations(activations, path, fingerprint=self.fingerprint)
        unfinished.discard()
        return load_activations(path, behaviours, self.neurons, fingerprint=self.fingerprint)

    def record(
        self,
        path: str,
        depends_on: Sequence[str],
        kind: type[KeptRecord] | Any,  # noqa: ANN401 - a class, or `list[Verdict]`
        make: Callable[[Unfinished], KeptRecord],
        *,
        keep: Callable[[KeptRecord], bool] = lambda record: True,
    ) -> KeptRecord:
        """A record as JSON: from its file in the folder, else made and written there.

        Args:
            path: its file, in the folder.
            depends_on: what it depends on beside the store's fingerprint.
            kind: its type, as pydantic reads and writes it.
            make: makes it; what finished batches leave goes into the `Unfinished` that it is given.
            keep: whether a record that was made is kept; one that is not is made anew the next time.

        Raises:
            InputError: a file that depends on something else, or is damaged.
        """
        file = self.folder / path
        fingerprint = fingerprint_of(self.fingerprint, *depends_on)
        unfinished = Unfinished(file.with_suffix(".unfinished"), fingerprint)
        if not file.is_file():
            made = make(unfinished)
            if not keep(made):
                return made
            content = TypeAdapter(kind).dump_python(made, mode="json")
            record = {"fingerprint": fingerprint, "content": content}
            write_json(file, record)
        unfinished.discard()
        kept = read_kept(file, _Kept[kind])
        if kept.fingerprint != fingerprint:
            raise InputError(f"{file} is of another model, other data, lengths or units: choose another folder")
        return kept.content

    def _path(self, state: State) -> Path:
        return self.folder / "states" / f"{file_name(state.title)}.safetensors"

    def _path_of_further(self, state: State) -> Path:
        return self.folder / "states" / "further" / f"{file_name(state.title)}.safetensors"

    def _kept(
        self,
        path: Path,
        model: HookedModel | None,
        state: State,
        tests: Sequence[Behaviour],
        reference: Measurement | None,
        neurons: Selection | None,
    ) -> Measurement:
        fingerprint = f"{self.fingerprint} {state.fingerprint or 'nothing'}"
        unfinished = Unfinished(path.with_suffix(".unfinished"), fingerprint)
        if not path.is_file():
            assert model is not None, f"{state.title} was not measured"
            with state.applied(model):
                measurement = measure(
                    model,
                    tests,
                    original=reference,
                    template=self.template,
                    answer_tokens=self.config.answer_tokens,
                    neurons=neurons,
                    batch_tokens=self.config.measure_tokens,
                    unfinished=unfinished,
                )
            # Later states are compared with the original's general text, and with nothing else.
            general = self.tests[2].name
            is_reference = not state.fingerprint and general in measurement.behaviours
            compared_on = general if is_reference else None
            save_measurement(measurement, path, fingerprint=fingerprint, compared_on=compared_on)
        # Also where a run was killed right after it saved.
        unfinished.discard()
        return load_measurement(path, tests, neurons, fingerprint=fingerprint)


@dataclass(frozen=True)
class _Kept(Generic[KeptRecord]):
    """What a JSON record's file holds."""

    fingerprint: str
    content: KeptRecord


def fingerprint_of(*parts: str) -> str:
    """A short hash of what something depends on."""
    content = " ".join(parts)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def file_name(name: str) -> str:
    """A file name of a state's title: spaces become underscores, and what a file name cannot hold does."""
    return "".join(letter if letter.isalnum() or letter in "-.=" else "_" for letter in name)
