"""States of the model, measured once and kept on disk, so that a killed run goes on where it was."""

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.data.examples import Behaviour, Example
from dean_interp.editing.ablation import ablate
from dean_interp.editing.values import Value, Zero, described
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import BehaviourMeasurement, Measurement, measure
from dean_interp.files import raise_if_damaged, read_tensors, write_tensors
from dean_interp.information.activations import Activations, distinct, groups_and_clusters, read_activations
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import Site
from dean_interp.progress import ProgressBar
from dean_interp.resume import Unfinished
from dean_interp.scoring.scores import Scores
from dean_interp.selection.selection import Selection, top_fraction
from dean_interp.study.config import StudyConfig

_FORMAT = "dean_interp.state.1"
_FIELDS = ("log_prob", "kl", "n_tokens")


class States:
    """Measures the model in one state after another; each is a file in `states/`, made once."""

    def __init__(
        self,
        config: StudyConfig,
        folder: Path,
        model: HookedModel,
        tests: Sequence[Behaviour],
        read: Selection | None,
        known: Sequence[str],
        progress: ProgressBar,
        calibration: Sequence[Behaviour] = (),
    ) -> None:
        """`read` are neurons whose activations are kept; `known` says what the files must be of, as fingerprints.

        Probes of a behaviour's safe answers are fitted on `calibration`, where both answers are there.
        """
        self.config, self.folder, self.model = config, folder, model
        self.tests, self.read, self.progress = tests, read, progress
        self.general = tests[2].name
        self.fingerprint = hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]
        self.original = self.measured("original", None)
        self.calibration = self._calibration(calibration)

    def measured(
        self,
        name: str,
        ablated: Selection | None,
        value: Value = Zero(),  # noqa: B008 - frozen
    ) -> Measurement:
        """The measurement of one state: from its files, else made and written there."""
        path = self.folder / f"{name.replace(' ', '_')}.safetensors"
        is_new = not path.is_file()
        self.progress.set_postfix_str(name)
        general = self._general(ablated, value)
        both = self._kept(path, self.tests[:2], ablated, self.read, value)
        self.progress.update(is_new)
        return Measurement({**both.behaviours, **general.behaviours}, both.activations)

    def kl(self, ablated: Selection) -> float:
        """KL to the original on general text alone (nats per token)."""
        return self._general(ablated)[self.general].mean_kl

    def _calibration(self, behaviours: Sequence[Behaviour]) -> Activations | None:
        """Activations of the unablated model on both behaviours' calibration answers, kept on disk."""
        if self.read is None or len(behaviours) < 2 or not all(behaviour.paired for behaviour in behaviours):
            return None
        path = self.folder / "calibration" / "reads.safetensors"
        if not path.is_file():
            unfinished = Unfinished(path.with_suffix(".unfinished"), self.fingerprint)
            config = self.config
            found = read_activations(self.model, behaviours, self.read, answers=True, template=config.template,
                         answer_tokens=config.answer_tokens, batch_tokens=config.measure_tokens,
                         unfinished=unfinished)  # fmt: skip
            write_tensors(path, _FORMAT, _tensors_of(found), {"fingerprint": self.fingerprint})
            unfinished.discard()
        return _reads_of(path, _read(path, self.fingerprint), self.read, distinct(behaviours))

    def _general(
        self,
        ablated: Selection | None,
        value: Value = Zero(),  # noqa: B008 - frozen
    ) -> Measurement:
        """General text has files of its own, named by what is ablated: a control's KL is known before its margins."""
        path = self.folder / self.general / f"{_key(ablated, value) or 'original'}.safetensors"
        return self._kept(path, self.tests[2:], ablated, None, value)

    def _kept(
        self,
        path: Path,
        tests: Sequence[Behaviour],
        ablated: Selection | None,
        read: Selection | None,
        value: Value,
    ) -> Measurement:
        fingerprint = f"{self.fingerprint} {_key(ablated, value) or 'nothing'}"
        if not path.is_file():
            unfinished = Unfinished(path.with_suffix(".unfinished"), fingerprint)
            measurement = self._measure(tests, ablated, read, value, unfinished)
            compared_on = self.general if ablated is None and self.general in measurement.behaviours else None
            save_measurement(measurement, path, fingerprint=fingerprint, compared_on=compared_on)
            unfinished.discard()
        return load_measurement(path, tests, read, fingerprint=fingerprint)

    def _measure(
        self,
        tests: Sequence[Behaviour],
        ablated: Selection | None,
        read: Selection | None,
        value: Value,
        unfinished: Unfinished,
    ) -> Measurement:
        config = self.config
        options = {"template": config.template, "answer_tokens": config.answer_tokens, "neurons": read,
                   "batch_tokens": config.measure_tokens, "unfinished": unfinished}  # fmt: skip
        if ablated is None:
            return measure(self.model, tests, **options)
        with ablate(self.model, ablated, value=value):
            return measure(self.model, tests, original=self._general(None), **options)


def _key(ablated: Selection | None, value: Value) -> str:
    """What is ablated, and how where it is not zero; empty for the original."""
    if ablated is None:
        return ""
    return ablated.fingerprint + ("" if isinstance(value, Zero) else f" {described(value)}")


def disjoint_neurons(scores: Sequence[Scores], fraction: float) -> tuple[Selection, Selection]:
    """Each behaviour's own top neurons. A neuron in both would inform about itself, so it is in neither read."""
    first, second = (top_fraction(one.of("neuron"), fraction) for one in scores[:2])
    return first - second, second - first


def save_measurement(measurement: Measurement, path: Path, *, fingerprint: str, compared_on: str | None = None) -> None:
    """Write a safetensors file; it appears whole or not at all.

    `fingerprint` says what was measured, and how: `load_measurement` refuses another.
    `compared_on` names the behaviour on which later measurements are compared with this one: only its `final` is kept.
    """
    tensors = {f"final/{compared_on}": measurement[compared_on].final} if compared_on else {}
    for name, behaviour in measurement.behaviours.items():
        tensors |= {f"{field}/{name}": getattr(behaviour, field) for field in _FIELDS}
    if measurement.activations is not None:
        tensors |= _tensors_of(measurement.activations)
    write_tensors(path, _FORMAT, tensors, {"fingerprint": fingerprint})


def load_measurement(
    path: Path, tests: Sequence[Behaviour], units: Selection | None, *, fingerprint: str
) -> Measurement:
    """The measurement of `tests` that `save_measurement` wrote. Raises `InputError` where it is of something else."""
    tensors = _read(path, fingerprint)
    for test in tests:
        log_prob, kl, n_tokens = (tensors.get(f"{field}/{test.name}", torch.empty(0)) for field in _FIELDS)
        shape = (len(test), 2 if test.paired else 1)
        is_whole = log_prob.shape == kl.shape == n_tokens.shape == shape and not n_tokens.is_floating_point()
        is_whole &= {log_prob.dtype, kl.dtype} <= {torch.float32, torch.float64}
        is_whole &= tensors.get(f"final/{test.name}", torch.empty(0, 0)).dim() == 2
        raise_if_damaged(path, not is_whole, f"it does not hold two numbers and a count of every answer of {test.name}")
    behaviours = {
        test.name: BehaviourMeasurement(
            test.name,
            tuple(test.prompts),
            *(tensors[f"{field}/{test.name}"] for field in _FIELDS),
            final=tensors.get(f"final/{test.name}", torch.zeros(0, 0)),
        )
        for test in tests
    }
    if units is None or not any(name.startswith("reads/") for name in tensors):
        return Measurement(behaviours)
    owned = [(test.name, example) for test in tests if test.paired for example in test.examples]
    return Measurement(behaviours, _reads_of(path, tensors, units, owned))


def stored_log_probs(folder: Path, state: str, behaviour: str) -> Float[Tensor, "prompt answer"]:
    """Of a behaviour's answers in a state that was measured. Raises `InputError` where there is none."""
    path = folder / f"{state.replace(' ', '_')}.safetensors"
    tensors, _ = read_tensors(path, _FORMAT, _Facts)
    if f"log_prob/{behaviour}" not in tensors:
        raise InputError(f"{path} holds no measurement of '{behaviour}'")
    return tensors[f"log_prob/{behaviour}"]


def _tensors_of(reads: Activations) -> dict[str, Tensor]:
    tensors = {f"reads/{site}": values for site, values in reads.values.items()}
    return tensors | {f"answers/{site}": values for site, values in reads.answers.items()}


def _reads_of(
    path: Path, tensors: Mapping[str, Tensor], units: Selection, owned: Sequence[tuple[str, Example]]
) -> Activations:
    found: dict[str, dict[Site, Tensor]] = {"reads": {}, "answers": {}}
    for kind, site in itertools.product(found, units.units):
        if f"{kind}/{site}" in tensors:
            one = found[kind][site] = tensors[f"{kind}/{site}"]
            shape = (len(owned), *((2,) if kind == "answers" else ()), len(units.units[site]))
            is_whole = one.shape == shape and one.is_floating_point()
            raise_if_damaged(path, not is_whole, f"the {kind} of {site} are not those of its units")
    return Activations(found["reads"], units, *groups_and_clusters(owned), found["answers"])


@dataclass(frozen=True)
class _Facts:
    fingerprint: str


def _read(path: Path, fingerprint: str) -> dict[str, Tensor]:
    tensors, facts = read_tensors(path, _FORMAT, _Facts)
    if facts.fingerprint != fingerprint:
        raise InputError(f"{path} is of another model, other data or other units: choose another folder")
    return tensors
