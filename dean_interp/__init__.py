"""Find the MLP units of a language model that matter to two behaviours at once, silence them, and measure what changed.

The method is DEAN (arXiv 2410.16672; SPIN in its second version, ACL 2025), on TransformerLens hook points.
"""

from dean_interp.data.examples import Behaviour, Example, load_behaviour
from dean_interp.editing.ablation import ablate
from dean_interp.errors import InputError
from dean_interp.evaluation.measure import Measurement, measure
from dean_interp.information.estimands import MutualInformation, mutual_information
from dean_interp.models.generate import generate
from dean_interp.models.load import load_model
from dean_interp.models.sites import Site
from dean_interp.scoring.importance import Scoring, importance
from dean_interp.scoring.scores import Scores, load_scores
from dean_interp.selection.controls import random_like
from dean_interp.selection.coupling import Coupling, coupled, coupling
from dean_interp.selection.selection import Selection, load_selection, top_fraction

__version__ = "0.1.0"

__all__ = [
    "Behaviour",
    "Coupling",
    "Example",
    "InputError",
    "Measurement",
    "MutualInformation",
    "Scores",
    "Scoring",
    "Selection",
    "Site",
    "ablate",
    "coupled",
    "coupling",
    "generate",
    "importance",
    "load_behaviour",
    "load_model",
    "load_scores",
    "load_selection",
    "measure",
    "mutual_information",
    "random_like",
    "top_fraction",
]
