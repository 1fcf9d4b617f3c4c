"""Find the MLP units of a language model that matter to two behaviours at once, silence them, and measure what changed.

The method is DEAN (arXiv 2410.16672; SPIN in its second version, ACL 2025), on TransformerLens hook points.
"""

from dean_interp.circuits.graph import Circuit
from dean_interp.circuits.trace import trace_circuit
from dean_interp.data.examples import Behaviour, Example, load_behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.editing.apply import apply_edit, create_edit, revert_edit
from dean_interp.editing.checkpoint import apply_edit_to_checkpoint, revert_edit_in_checkpoint
from dean_interp.editing.edit import Edit, load_edit
from dean_interp.editing.patching import patch_activations
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import Measurement, measure
from dean_interp.information.compare import mutual_information
from dean_interp.information.estimands import Arm, MutualInformationConfig, random_arm_like
from dean_interp.information.shifts import MutualInformation
from dean_interp.models.generate import generate
from dean_interp.models.load import load_model
from dean_interp.models.sites import Site
from dean_interp.report.circuit_page import CircuitPage, circuit_page
from dean_interp.report.neuron_page import NeuronPage, neuron_page
from dean_interp.scoring.importance import ScoringConfig, importance
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.coupling import Coupling, couple
from dean_interp.selection.expression import select
from dean_interp.selection.random_sets import random_like
from dean_interp.selection.selection import Selection, load_selection, top_count, top_fraction

__version__ = "0.1.0"

__all__ = [
    "Arm",
    "Behaviour",
    "Circuit",
    "CircuitPage",
    "Coupling",
    "Edit",
    "Example",
    "InputError",
    "Measurement",
    "MutualInformation",
    "MutualInformationConfig",
    "NeuronPage",
    "Scores",
    "ScoringConfig",
    "Selection",
    "Site",
    "ablate",
    "apply_edit",
    "apply_to_checkpoint",
    "circuit_page",
    "coupled",
    "coupling",
    "create_edit",
    "generate",
    "importance",
    "load_behaviour",
    "load_edit",
    "load_model",
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
    "select",
    "show_progress",
    "top_count",
    "top_fraction",
    "trace_circuit",
]
