"""The study, step by step: score, couple, ablate, measure beside controls, report. Finished steps are not done again.

A run folder holds `config.json`, `scores/`, `selection.safetensors`, `states/` (one measurement a file),
`results.json`, and `times.json` for what differs from run to run.
"""

import dataclasses
import fcntl
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from dean_interp.circuits.neuron import neuron_scores, strongest_neurons, top_texts
from dean_interp.data.examples import Behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import Measurement, measure
from dean_interp.information.estimands import N_SHUFFLES, MutualInformation, downstream_mi
from dean_interp.information.nulls import largest_fall
from dean_interp.models.load import HookedModel, load_model, model_fingerprint
from dean_interp.scoring.importance import importance, scores_fingerprint
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.controls import named_controls, random_like, strata
from dean_interp.selection.coupling import Coupling, coupling, refuse_empty
from dean_interp.selection.selection import Selection, top_fraction
from dean_interp.study.config import StudyConfig
from dean_interp.study.controls import grow_to_kl
from dean_interp.study.outcome import RANDOM_KINDS, design_of, headline_of, primary_of, state_of
from dean_interp.study.results import InformationChange, Results, State, load_results, save_results
from dean_interp.study.states import load_measurement, save_measurement

log = logging.getLogger(__name__)

N_NEURONS, N_TEXTS, N_TEXT_EXAMPLES = 8, 6, 32  # shown in the report
N_DRAWS = 3  # random draws that an equal-KL control may take to come within 10 % of the edit's KL
N_CONTROL_SHUFFLES = 199  # a control's null needs its mean, not a p-value


def run_study(config: StudyConfig, folder: str | Path) -> Results:
    """Run a study into a folder, or go on with the one that is there.

    Raises:
        InputError: anything wrong with the model, the data or the fractions, before any long work; a folder that holds
            another study; no coupled unit.
    """
    config.check()
    folder = Path(folder)
    calibration, tests = config.calibration(), config.tests()
    with _owned(folder, config):
        if (folder / "results.json").is_file():
            return load_results(folder / "results.json")
        clock = _Clock(folder / "times.json")
        model = load_model(config.model, device=config.device, dtype=config.dtype)
        clock.lap("load")
        scores = [_scores(model, behaviour, config, folder) for behaviour in calibration]
        clock.lap("score")
        found = coupling(*scores, fraction=config.fraction)
        refuse_empty(found, *scores)
        found.coupled.save(folder / "selection.safetensors")
        results = _Study(config, folder, model, tests, scores, found, clock).results()
        save_results(results, folder / "results.json")
        return results


class _Study:
    """What the steps after scoring share: the model, the tests, the original's measurement, and where states go."""

    def __init__(
        self,
        config: StudyConfig,
        folder: Path,
        model: HookedModel,
        tests: Sequence[Behaviour],
        scores: Sequence[Scores],
        found: Coupling,
        clock: "_Clock",
    ) -> None:
        self.config, self.folder, self.model = config, folder, model
        self.tests, self.scores, self.found, self.clock = tests, scores, found, clock
        self.behaviours, self.general = [test.name for test in tests[:2]], tests[2].name
        self.strata = strata(model, scores)
        self.first_read, self.second_read = _reads(scores, config.read_fraction)
        (folder / "states").mkdir(exist_ok=True)
        self.model_fingerprint = model_fingerprint(model)
        known = [self.model_fingerprint, *(test.fingerprint for test in tests), *(one.fingerprint for one in scores)]
        self.fingerprint = hashlib.sha256(" ".join(known).encode()).hexdigest()[:16]
        n_states, n_done = config.n_random + config.n_equal_kl + 5, len(list(folder.glob("states/*.safetensors")))
        self.progress = tqdm(total=n_states, initial=n_done, desc="states of the model", unit="state")
        self.original = self.measured("original", None)
        self.selections: dict[str, tuple[str, Selection, float]] = {"edit": ("edit", found.coupled, 1.0)}

    def results(self) -> Results:
        """Controls first, then what they allow to be detected, then the edit."""
        config, edit = self.config, self.found.coupled
        for i in range(config.n_random):
            self.selections[f"random {i + 1}"] = ("random", self.random(i, 1.0), 1.0)
        random = [self.measured(name, chosen) for name, (_, chosen, _) in self.selections.items() if name != "edit"]
        n_controls = config.n_random + config.n_equal_kl
        design = design_of(random, self.original, self.behaviours, n_controls)
        log.info("before the edit is measured: %s", design)
        self.clock.lap("original and random controls")
        target = self.measured("edit", edit)[self.general].mean_kl
        for name, chosen in named_controls(self.found, *self.scores).items():
            if len(chosen):
                self.selections[name] = ("named", chosen, len(chosen) / len(edit))
        for i in range(config.n_equal_kl):
            self.selections[f"equal KL {i + 1}"] = ("equal KL", *self.equal_kl(i, target))
        states = [state_of("original", "original", 0, 0.0, self.original, self.original, self.general)]
        states += [
            state_of(name, kind, len(chosen), growth, self.measured(name, chosen), self.original, self.general)
            for name, (kind, chosen, growth) in self.selections.items()
        ]
        self.progress.close()
        self.clock.lap("edit, named and equal-KL controls")
        primary = primary_of(states[1], states)
        information = self.information(states)
        self.clock.lap("mutual information")
        neurons = strongest_neurons(edit, *self.scores[:2], n_neurons=N_NEURONS)
        shown = [dataclasses.replace(test, examples=test.examples[:N_TEXT_EXAMPLES]) for test in self.tests]
        texts = top_texts(self.model, neurons, shown, n_texts=N_TEXTS, template=config.template)
        self.clock.lap("neuron views")
        return Results(
            config,
            self.model_fingerprint,
            self.model.cfg.n_layers,
            self.model.cfg.d_mlp,
            self.found.sizes(),
            tuple(edit.counts().values()),
            design,
            primary,
            tuple(states),
            information,
            tuple(neuron_scores(neuron, self.scores) for neuron in neurons),
            tuple(texts),
            headline_of(states[1], states, primary),
        )

    def measured(self, name: str, ablated: Selection | None) -> Measurement:
        """The measurement of one state: from its file, else made and written there."""
        path = self.folder / "states" / f"{name.replace(' ', '_')}.safetensors"
        read = self.first_read | self.second_read
        fingerprint = f"{self.fingerprint} {ablated.fingerprint if ablated is not None else 'nothing'}"
        if not path.is_file():
            self.progress.set_postfix_str(name)
            compared_on = self.general if ablated is None else None
            measurement = self._measure(self.tests, ablated, read)
            save_measurement(measurement, path, fingerprint=fingerprint, compared_on=compared_on)
            self.progress.update()
        return load_measurement(path, self.tests, read, fingerprint=fingerprint)

    def random(self, number: int, growth: float) -> Selection:
        """The `number`-th random selection like the edit, at a given growth."""
        seed = self.config.seed * 1000 + number
        return random_like(self.found.coupled, self.strata, seed=seed, growth=growth)

    def equal_kl(self, number: int, target: float) -> tuple[Selection, float]:
        """Random control `number` of equal KL, and its growth; both are remembered beside the states.

        One neuron alone can jump over the allowed band of KL. Then another draw is grown, up to `N_DRAWS` in all.
        """
        path = self.folder / "states" / "equal_kl.json"
        known: dict[str, tuple[int, float]] = json.loads(path.read_text()) if path.is_file() else {}
        for attempt in range(0 if str(number) in known else N_DRAWS):
            draw = self.config.n_random + number + attempt * self.config.n_equal_kl
            self.progress.set_postfix_str(f"equal KL {number + 1}: size")
            growth, inside = grow_to_kl(
                lambda growth, draw=draw: self.random(draw, growth),
                lambda chosen: self._measure(self.tests[2:], chosen, None)[self.general].mean_kl,
                target,
                bounds=_growth_bounds(self.found.coupled),
                start=list(known.values())[-1][1] if known else 1.0,
            )
            known[str(number)] = draw, growth
            if inside:
                break
            if attempt == N_DRAWS - 1:
                log.warning("equal-KL control %d does not come within 10 %% of the edit's KL", number + 1)
        _write(path, json.dumps(known))
        draw, growth = known[str(number)]
        return self.random(draw, growth), growth

    def information(self, states: Sequence[State]) -> InformationChange:
        """`downstream_mi` under the edit and under every random control, on the activations already at hand."""
        controls = [state.name for state in states if state.kind in RANDOM_KINDS]
        edit = self._mutual_information("edit", N_SHUFFLES)
        changes = {
            name: self._mutual_information(name, N_CONTROL_SHUFFLES).changes
            for name in tqdm(controls, desc="mutual information", leave=False)
        }
        layer, p = largest_fall(edit.changes, list(changes.values()))
        return InformationChange(edit, changes, layer, p)

    def _mutual_information(self, name: str, n_shuffles: int) -> MutualInformation:
        chosen = self.selections[name][1]
        before, after = self.original.reads, self.measured(name, chosen).reads
        assert before is not None and after is not None
        return downstream_mi(
            before,
            after,
            self.first_read,
            self.second_read,
            ablated=chosen,
            n_shuffles=n_shuffles,
            seed=self.config.seed,
        )

    def _measure(self, tests: Sequence[Behaviour], ablated: Selection | None, read: Selection | None) -> Measurement:
        options = {"template": self.config.template, "answer_tokens": self.config.answer_tokens, "read": read}
        if ablated is None:
            return measure(self.model, tests, **options)
        general = Measurement({self.general: self.original[self.general]})
        with ablate(self.model, ablated):
            return measure(self.model, tests, original=general, **options)


def _reads(scores: Sequence[Scores], fraction: float) -> tuple[Selection, Selection]:
    """Each behaviour's own top neurons. A neuron in both would inform about itself, so it is in neither read."""
    first, second = (top_fraction(one, fraction) for one in scores[:2])
    return first - second, second - first


def _scores(model: HookedModel, behaviour: Behaviour, config: StudyConfig, folder: Path) -> Scores:
    """From the run folder where the file is of this very model and data, else scored and written there."""
    path = folder / "scores" / f"{behaviour.name}.neuron.safetensors"
    if path.is_file():
        scores = load_scores(path)
        if scores.fingerprint == scores_fingerprint(model, behaviour, unit="neuron", template=config.template):
            return scores
        raise InputError(f"{path} was made with another model or other data: choose another folder")
    path.parent.mkdir(exist_ok=True)
    scores = importance(model, behaviour, template=config.template)
    scores.save(path)
    return scores


def _growth_bounds(selection: Selection) -> tuple[float, float]:
    """From one unit to all those outside the selection, at the sites that it has units at."""
    outside = sum(selection.shapes[site][0] - n for site, n in selection.counts().items() if n)
    return 1 / len(selection), outside / len(selection)


@contextmanager
def _owned(folder: Path, config: StudyConfig) -> Iterator[None]:
    """The folder, for this study and this process alone."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"another run is writing to {folder}") from error
        path, wanted = folder / "config.json", dataclasses.asdict(config)
        if path.is_file() and (folder / "scores").is_dir():  # before the first scores there is nothing to lose
            there = json.loads(path.read_text())
            other = [name for name in wanted if there.get(name) != wanted[name]]
            if other:
                raise InputError(f"{folder} holds a run with another {', '.join(other)}: choose another folder")
        else:
            _write(path, json.dumps(wanted, indent=1) + "\n")
        yield


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    unfinished.replace(path)


class _Clock:
    """Seconds that each step took, in a file of their own; steps of an earlier process keep theirs."""

    def __init__(self, path: Path) -> None:
        self.path, self.started = path, time.monotonic()
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def lap(self, step: str) -> None:
        """The time since the last lap belongs to `step`."""
        now = time.monotonic()
        self.seconds[step] = round(self.seconds.get(step, 0) + now - self.started, 1)
        self.started = now
        _write(self.path, json.dumps(self.seconds, indent=1) + "\n")
