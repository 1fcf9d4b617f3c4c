"""What a study found, as frozen records, and their file. Nothing in it depends on the time or place of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from dean_interp.circuits.neuron import NeuronScores, TextActivations
from dean_interp.errors import InputError
from dean_interp.information.estimands import MutualInformation
from dean_interp.statistics import Interval
from dean_interp.study.config import StudyConfig


@dataclass(frozen=True)
class Design:
    """What the study can detect, stated before the edit is measured. Margins in nats per token."""

    n_prompts: int
    detectable: Mapping[str, float]
    """Per behaviour: the mean change that a paired 95 % interval finds with 80 % power, where changes vary over prompts
    as those of the size-matched controls do."""
    to_beat: Mapping[str, float]
    """Per behaviour: the largest mean change among the random ablations matched in size."""
    smallest_p: float
    """The smallest p that the number of random controls allows."""


@dataclass(frozen=True)
class State:
    """The model in one state: original, edited, or under a control."""

    name: str
    kind: str
    """`original`, `edit`, `random`, `equal KL` or `named`."""
    n_units: int
    growth: float
    """Size relative to the edit, for random controls."""
    margin: Mapping[str, float]
    """Mean over test prompts of log p(safe) - log p(unsafe), nats per token."""
    change: Mapping[str, Interval]
    """Of the margin, against the original: paired, clustered by prompt, 95 %."""
    perplexity: float
    kl: float
    """KL(original || now) on general text, nats per token."""


@dataclass(frozen=True)
class Primary:
    """The outcome fixed beforehand: both mean margins rise beyond the random controls, at a KL no worse than theirs."""

    p: Mapping[str, float]
    """Per behaviour: rank of the edit's change among all random controls, one-sided."""
    p_larger: float
    kl: float
    kl_of_controls: float
    """The largest KL among the random controls."""
    both_rise: bool
    reached: bool


@dataclass(frozen=True)
class InformationChange:
    """`downstream_mi` before and after the edit, and its change under every random control, one entry a layer."""

    edit: MutualInformation
    control_changes: Mapping[str, tuple[float, ...]]
    largest_fall_layer: int
    largest_fall_p: float
    """Of a fall that large in any layer, by its rank among the random controls (max-statistic)."""


@dataclass(frozen=True)
class Results:
    """The whole study."""

    config: StudyConfig
    model_fingerprint: str
    n_layers: int
    d_mlp: int
    sizes: Mapping[str, int]
    """Units in each set on the way to the coupled ones."""
    coupled_per_layer: tuple[int, ...]
    design: Design
    primary: Primary
    states: tuple[State, ...]
    information: InformationChange
    neurons: tuple[NeuronScores, ...]
    texts: tuple[TextActivations, ...]
    headline: str

    def state(self, name: str) -> State:
        """One state by name."""
        return next(state for state in self.states if state.name == name)


_ADAPTER = TypeAdapter(Results)


def save_results(results: Results, path: Path) -> None:
    """Write the JSON file; it appears whole or not at all. Equal results give equal bytes."""
    unfinished = path.with_suffix(".part")
    unfinished.write_bytes(_ADAPTER.dump_json(results, indent=1) + b"\n")
    unfinished.replace(path)


def load_results(path: Path) -> Results:
    """Results from their file. Raises `InputError` where it is missing or something else."""
    if not path.is_file():
        raise InputError(f"no results in {path.parent}: {path.name} is missing")
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(f"{path} does not hold results of this version ({error.error_count()} faults)") from error
