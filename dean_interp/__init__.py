"""Find the MLP units of a language model that matter to two behaviours at once, silence them, and measure what changed.

The method is DEAN (arXiv 2410.16672; SPIN in its second version, ACL 2025), on TransformerLens hook points.

A name is imported when it is first used, so that `import dean_interp` loads neither torch nor anything that draws pages
or trains. A new public name goes into all three lists below; a test compares them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dean_interp.circuits.graph import Circuit
    from dean_interp.circuits.trace import trace_circuit
    from dean_interp.data.examples import Behaviour, Example, load_behaviour
    from dean_interp.editing.ablation import ablate, gated
    from dean_interp.editing.apply import apply_edit, create_edit, create_gates_edit, revert_edit
    from dean_interp.editing.checkpoint import apply_edit_to_checkpoint, revert_edit_in_checkpoint
    from dean_interp.editing.edit import Edit, load_edit
    from dean_interp.editing.patching import patch_activations
    from dean_interp.editing.values import Mean, Scale, Zero
    from dean_interp.errors import InputError
    from dean_interp.evaluation.measure import measure
    from dean_interp.evaluation.measurement import Measurement
    from dean_interp.exploring.explore_page import ExplorePage, explore_page
    from dean_interp.exploring.held_out import ExploreConfig
    from dean_interp.exploring.notebook import explore
    from dean_interp.information.compare import mutual_information
    from dean_interp.information.estimands import InformationArm, MutualInformationConfig, random_arm_like
    from dean_interp.information.shifts import MutualInformation
    from dean_interp.models.chat_settings import ChatSettings
    from dean_interp.models.generate import generate
    from dean_interp.models.load import load_model
    from dean_interp.models.sites import Site
    from dean_interp.progress import show_progress
    from dean_interp.report.circuit_page import CircuitPage, circuit_page
    from dean_interp.report.html import write_report
    from dean_interp.report.neuron_page import NeuronPage, neuron_page
    from dean_interp.scoring.importance import importance
    from dean_interp.scoring.preparation import ScoringConfig
    from dean_interp.scoring.scores import Scores, load_scores
    from dean_interp.selection.coupling import Coupling, couple
    from dean_interp.selection.expression import select
    from dean_interp.selection.gains import Gains, damage_of, gains_of
    from dean_interp.selection.gates import Gates, load_gates
    from dean_interp.selection.gating import GatingConfig, closed_form_gates
    from dean_interp.selection.random_sets import random_like
    from dean_interp.selection.selection import Selection, load_selection, top_count, top_fraction
    from dean_interp.selection.strata import strata
    from dean_interp.study.config import EvaluationConfig, InformationConfig, StudyConfig, SweepConfig
    from dean_interp.study.evaluate import estimate_information, evaluate_edit
    from dean_interp.study.evaluation import Evaluation
    from dean_interp.study.improve import run_improve
    from dean_interp.study.improvement import ImproveConfig, Improvement
    from dean_interp.study.measured_edit import load_run
    from dean_interp.study.results import Results
    from dean_interp.study.run import run_study
    from dean_interp.study.settings import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig
    from dean_interp.study.sweep import Sweep, run_sweep
    from dean_interp.study.verify import verify_run

__version__ = "0.1.0"

__all__ = [
    "AnswerConfig",
    "Behaviour",
    "CalibrationConfig",
    "ChatSettings",
    "Circuit",
    "CircuitPage",
    "ControlConfig",
    "Coupling",
    "DataConfig",
    "Edit",
    "Evaluation",
    "EvaluationConfig",
    "Example",
    "ExploreConfig",
    "ExplorePage",
    "Gains",
    "Gates",
    "GatingConfig",
    "ImproveConfig",
    "Improvement",
    "InformationArm",
    "InformationConfig",
    "InputError",
    "Mean",
    "Measurement",
    "ModelConfig",
    "MutualInformation",
    "MutualInformationConfig",
    "NeuronPage",
    "Results",
    "Scale",
    "Scores",
    "ScoringConfig",
    "Selection",
    "Site",
    "StudyConfig",
    "Sweep",
    "SweepConfig",
    "Zero",
    "ablate",
    "apply_edit",
    "apply_edit_to_checkpoint",
    "circuit_page",
    "closed_form_gates",
    "couple",
    "create_edit",
    "create_gates_edit",
    "damage_of",
    "estimate_information",
    "evaluate_edit",
    "explore",
    "explore_page",
    "gains_of",
    "gated",
    "generate",
    "importance",
    "load_behaviour",
    "load_edit",
    "load_gates",
    "load_model",
    "load_run",
    "load_scores",
    "load_selection",
    "measure",
    "mutual_information",
    "neuron_page",
    "patch_activations",
    "random_arm_like",
    "random_like",
    "revert_edit",
    "revert_edit_in_checkpoint",
    "run_improve",
    "run_study",
    "run_sweep",
    "select",
    "show_progress",
    "strata",
    "top_count",
    "top_fraction",
    "trace_circuit",
    "verify_run",
    "write_report",
]

_MODULES = {
    "AnswerConfig": "study.settings",
    "InformationArm": "information.estimands",
    "Behaviour": "data.examples",
    "CalibrationConfig": "study.settings",
    "ChatSettings": "models.chat_settings",
    "Circuit": "circuits.graph",
    "CircuitPage": "report.circuit_page",
    "ControlConfig": "study.settings",
    "Coupling": "selection.coupling",
    "DataConfig": "study.settings",
    "Edit": "editing.edit",
    "Evaluation": "study.evaluation",
    "EvaluationConfig": "study.config",
    "Example": "data.examples",
    "ExploreConfig": "exploring.held_out",
    "ExplorePage": "exploring.explore_page",
    "Gains": "selection.gains",
    "Gates": "selection.gates",
    "GatingConfig": "selection.gating",
    "ImproveConfig": "study.improvement",
    "Improvement": "study.improvement",
    "InformationConfig": "study.config",
    "InputError": "errors",
    "Mean": "editing.values",
    "Measurement": "evaluation.measurement",
    "ModelConfig": "study.settings",
    "MutualInformation": "information.shifts",
    "MutualInformationConfig": "information.estimands",
    "NeuronPage": "report.neuron_page",
    "Results": "study.results",
    "Scale": "editing.values",
    "Scores": "scoring.scores",
    "ScoringConfig": "scoring.preparation",
    "Selection": "selection.selection",
    "Site": "models.sites",
    "StudyConfig": "study.config",
    "Sweep": "study.sweep",
    "SweepConfig": "study.config",
    "Zero": "editing.values",
    "ablate": "editing.ablation",
    "apply_edit": "editing.apply",
    "apply_edit_to_checkpoint": "editing.checkpoint",
    "circuit_page": "report.circuit_page",
    "closed_form_gates": "selection.gating",
    "couple": "selection.coupling",
    "create_edit": "editing.apply",
    "create_gates_edit": "editing.apply",
    "damage_of": "selection.gains",
    "estimate_information": "study.evaluate",
    "evaluate_edit": "study.evaluate",
    "explore": "exploring.notebook",
    "explore_page": "exploring.explore_page",
    "gains_of": "selection.gains",
    "gated": "editing.ablation",
    "generate": "models.generate",
    "importance": "scoring.importance",
    "load_behaviour": "data.examples",
    "load_edit": "editing.edit",
    "load_gates": "selection.gates",
    "load_model": "models.load",
    "load_run": "study.measured_edit",
    "load_scores": "scoring.scores",
    "load_selection": "selection.selection",
    "measure": "evaluation.measure",
    "mutual_information": "information.compare",
    "neuron_page": "report.neuron_page",
    "patch_activations": "editing.patching",
    "random_arm_like": "information.estimands",
    "random_like": "selection.random_sets",
    "revert_edit": "editing.apply",
    "revert_edit_in_checkpoint": "editing.checkpoint",
    "run_improve": "study.improve",
    "run_study": "study.run",
    "run_sweep": "study.sweep",
    "select": "selection.expression",
    "show_progress": "progress",
    "strata": "selection.strata",
    "top_count": "selection.selection",
    "top_fraction": "selection.selection",
    "trace_circuit": "circuits.trace",
    "verify_run": "study.verify",
    "write_report": "report.html",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - any public name
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    # the next use finds the name itself, and does not come here
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
