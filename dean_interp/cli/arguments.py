"""The arguments of the command `dean-interp`: one record a step."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, subcommand

from dean_interp.cli.circuits import CircuitStep, NeuronStep
from dean_interp.cli.data import DataStep
from dean_interp.cli.edits import EditStep
from dean_interp.cli.model import Model
from dean_interp.data.examples import ResponseKind
from dean_interp.editing.ablation import Positions
from dean_interp.models.sites import Modules, Unit
from dean_interp.planning.study import Devices
from dean_interp.scoring.preparation import Target
from dean_interp.scoring.scores import KEPT_FRACTION
from dean_interp.selection.selection import Within
from dean_interp.study.asked import Asked
from dean_interp.study.config import StudyConfig
from dean_interp.study.sweep import SweepConfig

ScoringMethod = Literal["importance", "integrated_gradients", "wanda", "activation_contrast", "magnitude", "random"]


@dataclass(frozen=True)
class Tests:
    """What the model is measured on."""

    first: str = "fairness"
    """First behaviour: a built-in name, a CSV or JSONL file with safe and unsafe answers, or a hub data set."""
    second: str = "privacy"
    """Second behaviour."""
    general: str = "general"
    """General ability."""
    n_test: int = 48
    """Test prompts of each of the two behaviours."""
    n_general_test: int = 32
    """General test examples."""
    answer_tokens: int | None = 12
    """First tokens of each test answer that are measured (None: all)."""
    scores: tuple[Path, ...] = ()
    """Score files of first, second and general: what random controls are matched by, and reads are taken from."""
    n_random: int = 19
    """Random controls of the selection's size, where there are scores. Below 19, p cannot reach 0.05."""
    information_fraction: float = 0.05
    """Top fraction from which reads are taken: neurons of one behaviour, not of the other."""
    seed: int = 0
    """Of the draws of examples, the controls, the read noise and the shuffles."""


@dataclass(frozen=True)
class Score:
    """Score every unit for one behaviour. Killed and started again, it goes on from the last finished batch."""

    behaviour: Positional[str]
    """A built-in name, a CSV or JSONL file, or a hub data set."""
    out: Path
    """The score file to write."""
    unit: tuple[Unit, ...] = ("neuron",)
    """MLP neurons, single MLP weights, or both in one pass."""
    n_examples: int = 128
    """Examples that are scored, from the calibration split."""
    response: ResponseKind = "safe"
    """Which of two answers is scored."""
    seed: int = 0
    """Of the draw of examples."""
    method: ScoringMethod = "importance"
    """How units are scored (see `scoring.methods`): importance is DEAN's, by gradients."""
    target: Target = "response"
    """What the gradient is of: the scored answer's loss, or the margin between the safe and the unsafe answer."""
    signed: bool = False
    """Keep the sign of the effect."""
    modules: Modules = "mlp"
    """Which matrices' weights are scored: the MLPs', attention's, or all."""
    max_tokens: int | None = None
    """Cut answers so that no text is longer; None: longer texts than the model takes are refused."""
    batch_tokens: int | None = None
    """Padded tokens a batch; None: 512 on the CPU, 4096 elsewhere, fewer where they do not fit."""
    keep: float = KEPT_FRACTION
    """Top fraction of each matrix's weights that the file holds; 1 keeps all."""
    dry_run: bool = False
    """Say what scoring will take (memory, time, batches) and stop."""
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class PlanStudy:
    """Say what `run` would take on given devices, from the model's configuration and tokenizer: no weight is read."""

    devices: OmitArgPrefixes[Devices] = field(default_factory=Devices)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=StudyConfig)


@dataclass(frozen=True)
class Couple:
    """Select units by set algebra over the tops of several behaviours.

    Three score files and no expression give the coupled units: important to the first two behaviours, not to the third.
    """

    scores: Positional[tuple[Path, ...]]
    """Score files. An expression calls each by its behaviour's name, with _ for what a name cannot hold."""
    out: Path
    """The selection file to write."""
    expression: str | None = None
    """What to select, with &, |, - and parentheses; unset, for three files: (first & second) - third."""
    unit: Unit = "neuron"
    """Which kind of unit."""
    fraction: tuple[float, ...] = (0.01,)
    """Top fraction that counts as important; one, or one for each score file."""
    count: int | None = None
    """How many units count as important, instead of a fraction."""
    within: Within = "matrix"
    """What units are ranked against: those of their matrix (or layer of neurons), their layer, or the model."""


@dataclass(frozen=True)
class Ablate:
    """Show what the model answers with and without the selected units."""

    selection: Positional[Path]
    """The selection file."""
    prompts: tuple[str, ...] = ()
    """Questions to ask; none: those of `behaviour`."""
    behaviour: str = "privacy"
    """Whose test prompts are asked where no `prompts` are given."""
    n_prompts: int = 8
    """How many of them."""
    alpha: float = 0.0
    """What the units' activations (or the weights) are multiplied by: 0 silences."""
    positions: Positions = "all"
    """Where: everywhere, in the prompt only, or in the answer only."""
    max_new_tokens: int = 40
    """Length of the answers."""
    batch_size: int = 32
    """Prompts a batch."""
    seed: int = 0
    """Of the draw of prompts."""
    out: Path | None = None
    """A JSON file to write too; finished batches are kept beside it, so that a killed run goes on."""
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class Evaluate:
    """Say in one table what an ablation does: margins, judged answers, over-refusal, general ability.

    Random controls are measured where scores are given. Killed and started again, it goes on from the last batch.
    """

    selection: Positional[Path]
    """The selection file."""
    out: Path
    """A folder for `evaluation.json` and the measured states; `information` may share it."""
    asked: OmitArgPrefixes[Asked] = field(default_factory=Asked)
    tests: OmitArgPrefixes[Tests] = field(default_factory=Tests)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class Information:
    """Estimate the mutual information of both behaviours' neurons before and under an ablation, beside controls."""

    selection: Positional[Path]
    """The selection file."""
    out: Path
    """A folder for `information.json` and the measured states; `evaluate` may share it."""
    tests: OmitArgPrefixes[Tests] = field(default_factory=Tests)
    model: OmitArgPrefixes[Model] = field(default_factory=Model)


@dataclass(frozen=True)
class Run:
    """Run the whole study: score, couple, ablate, measure beside controls, report. Resumes where it was stopped."""

    study: OmitArgPrefixes[StudyConfig]
    out: Path = Path("runs/demo")
    """The run folder; `report.html` appears in it."""


@dataclass(frozen=True)
class RunSweep:
    """Try many edits from one scoring pass; choose the Pareto front on half of the tests, confirm it on the other."""

    sweep: OmitArgPrefixes[SweepConfig]
    out: Path = Path("runs/sweep")
    """The run folder; `sweep.html` appears in it."""


@dataclass(frozen=True)
class Verify:
    """Whether a finished run is what it says: files, fingerprints, and a sample of its numbers measured again.

    Ends with exit code 1 where something differs by more than float noise.
    """

    run: Positional[Path]
    """The run folder."""
    full: bool = False
    """Score everything again, too."""


@dataclass(frozen=True)
class Report:
    """Draw `report.html` anew from the results in a run folder; of several folders, a page that compares them."""

    folders: Positional[tuple[Path, ...]]
    """The run folders."""
    out: Path | None = None
    """The page of several runs; unset: comparison.html in the first folder."""


Step = (
    DataStep
    | PlanStudy
    | Score
    | Couple
    | Ablate
    | Evaluate
    | Information
    | EditStep
    | NeuronStep
    | CircuitStep
    | RunSweep
    | Run
    | Verify
    | Report
)


@dataclass(frozen=True)
class Command:
    """Coupled units of two behaviours: score, couple, ablate, evaluate, edit and so on one by one, or run for all."""

    step: OmitArgPrefixes[
        Annotated[DataStep, subcommand("data")]
        | Annotated[PlanStudy, subcommand("plan")]
        | Annotated[Score, subcommand("score")]
        | Annotated[Couple, subcommand("couple")]
        | Annotated[Ablate, subcommand("ablate")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Information, subcommand("information")]
        | Annotated[EditStep, subcommand("edit")]
        | Annotated[NeuronStep, subcommand("neuron")]
        | Annotated[CircuitStep, subcommand("circuit")]
        | Annotated[RunSweep, subcommand("sweep")]
        | Annotated[Run, subcommand("run")]
        | Annotated[Verify, subcommand("verify")]
        | Annotated[Report, subcommand("report")]
    ]
    json: bool = False
    """Print one JSON object on standard output instead of text."""
    debug: bool = False
    """Show the trace of an error, too."""
