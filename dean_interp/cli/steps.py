"""The steps of the command: which there are, and what does each."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import OmitArgPrefixes, subcommand

from dean_interp.cli.chat import ChatWithEdit, do_chat
from dean_interp.cli.circuits import ShowCircuit, ShowNeuron, do_circuit, do_neuron
from dean_interp.cli.data import DataStep, do_data
from dean_interp.cli.edits import EditStep, do_edit
from dean_interp.cli.exploring import ExploreChange, do_explore
from dean_interp.cli.improving import ImproveEdit, do_improve
from dean_interp.cli.measuring import (
    AblateUnits,
    EstimateInformation,
    EvaluateEdit,
    do_ablate,
    do_evaluate,
    do_information,
)
from dean_interp.cli.pages import WritePages, do_pages
from dean_interp.cli.step_result import StepResult
from dean_interp.cli.studies import (
    PlanStudy,
    RunStudy,
    RunSweep,
    VerifyRun,
    WriteReport,
    do_plan,
    do_report,
    do_run,
    do_sweep,
    do_verify,
)
from dean_interp.cli.terminal import Talk
from dean_interp.cli.units import CoupleUnits, ScoreUnits, do_couple, do_score

Step = (
    Annotated[DataStep, subcommand("data")]
    | Annotated[PlanStudy, subcommand("plan")]
    | Annotated[ScoreUnits, subcommand("score")]
    | Annotated[CoupleUnits, subcommand("couple")]
    | Annotated[AblateUnits, subcommand("ablate")]
    | Annotated[EvaluateEdit, subcommand("evaluate")]
    | Annotated[EstimateInformation, subcommand("information")]
    | Annotated[EditStep, subcommand("edit")]
    | Annotated[ChatWithEdit, subcommand("chat")]
    | Annotated[ExploreChange, subcommand("explore")]
    | Annotated[ShowNeuron, subcommand("neuron")]
    | Annotated[ShowCircuit, subcommand("circuit")]
    | Annotated[WritePages, subcommand("pages")]
    | Annotated[ImproveEdit, subcommand("improve")]
    | Annotated[RunSweep, subcommand("sweep")]
    | Annotated[RunStudy, subcommand("run")]
    | Annotated[VerifyRun, subcommand("verify")]
    | Annotated[WriteReport, subcommand("report")]
)


@dataclass(frozen=True)
class Command:
    """Find, change and measure the units behind two behaviours.

    `improve` finds an edit that raises both and confirms it. `run` does the whole study of the paper's method. The
    others do one step each.
    """

    step: OmitArgPrefixes[Step]
    json: bool = False
    """Print one JSON object to stdout in place of text."""
    debug: bool = False
    """Print the traceback of an error, too."""


def do(step: Step, talk: Talk) -> StepResult:
    """Do one step. `talk` is for steps that talk with their user while they run.

    Raises `InputError` for what their user can put right.
    """
    match step:
        case DataStep():
            return do_data(step)
        case PlanStudy():
            return do_plan(step)
        case ScoreUnits():
            return do_score(step)
        case CoupleUnits():
            return do_couple(step)
        case AblateUnits():
            return do_ablate(step)
        case EvaluateEdit():
            return do_evaluate(step)
        case EstimateInformation():
            return do_information(step)
        case EditStep():
            return do_edit(step)
        case ChatWithEdit():
            return do_chat(step, talk)
        case ExploreChange():
            return do_explore(step)
        case ShowNeuron():
            return do_neuron(step)
        case ShowCircuit():
            return do_circuit(step)
        case WritePages():
            return do_pages(step)
        case ImproveEdit():
            return do_improve(step)
        case RunSweep():
            return do_sweep(step)
        case RunStudy():
            return do_run(step)
        case VerifyRun():
            return do_verify(step)
        case WriteReport():
            return do_report(step)
