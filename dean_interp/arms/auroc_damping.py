"""AUROC damping: neurons that tell unsafe answers from safe ones are damped by how well they do (arXiv 2407.12824).

AurA, section 3: a neuron detects unsafe text by its largest activation over the text's tokens; one whose AUROC is above
0.5 is an expert, and is multiplied by `1 - 2 (AUROC - 0.5)`. Others stay. A dose scales the change, so that at 1 it is
the paper's; beyond it no multiplier goes below 0. A neuron has an AUROC for each of two behaviours, over that
behaviour's answers, and counts with the mean of both. The place is `mlp.hook_post`, over answer tokens. "Expert" is the
paper's word: a neuron. In a mixture of experts, tokens that are not sent to a neuron's expert count with 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor

from dean_interp.arms.answer_statistics import Summary, answer_statistics
from dean_interp.arms.arm import ArmExamples, Kind, Setting, Settings
from dean_interp.arms.changes import AlongGates
from dean_interp.errors import InputError
from dean_interp.models.matrices import neuron_sites
from dean_interp.selection.gates import Gates

_POOLED: dict[Setting, Summary] = {"max": "largest", "mean": "mean"}
_FIRST_DOSE = 0.5


@dataclass(frozen=True)
class AurocDamping:
    """Damping the neurons that detect unsafe answers."""

    name: str = "AUROC damping"
    kind: Kind = "activations"
    source: str = "arXiv 2407.12824, section 3 (AurA)"
    uses_labels: bool = True

    @property
    def choices(self) -> Mapping[str, Sequence[Setting]]:
        """How an answer's tokens become one number, and the share of experts, the best ones, that are damped."""
        return {"pooling": tuple(_POOLED), "share": (1.0, 0.1)}

    def fit(self, examples: ArmExamples, settings: Settings) -> AlongGates:
        """The experts' multipliers. Raises `InputError` as `answer_statistics`, or for settings that are none."""
        pooling, share = settings["pooling"], float(settings["share"])
        if pooling not in _POOLED or not 0 < share <= 1:
            raise InputError(f"pooling must be one of {tuple(_POOLED)} and share in (0, 1], got {pooling!r}, {share}")
        both = answer_statistics(examples, "neurons")
        multipliers = {}
        for site in neuron_sites(examples.model):
            aurocs = []
            for statistics in both:
                safe, unsafe = statistics.of(_POOLED[pooling], site.hook_name).unbind(1)
                aurocs.append(auroc(unsafe, safe))
            mean = torch.stack(aurocs).mean(0)
            multiplier = 1 - 2 * (mean - 0.5)
            # Neurons that detect no unsafe text stay as they are.
            multipliers[site] = multiplier.clamp(max=1).float()
        first, second = examples.scoring[:2]
        gates = Gates(multipliers, first.prompt_hashes | second.prompt_hashes)
        if share < 1 and len(gates):
            n_damped = max(1, round(share * len(gates)))
            gates = gates.strongest(n_damped)
        return AlongGates(gates, _FIRST_DOSE)


def auroc(
    unsafe: Float[Tensor, "unsafe unit"],
    safe: Float[Tensor, "safe unit"],
) -> Float[Tensor, " unit"]:
    """The chance that a unit is larger on a random unsafe text than on a random safe one; ties count half. float64."""
    # Mann and Whitney's U: the sum of the unsafe texts' ranks among all, less what it is at least.
    both = np.concatenate([unsafe.numpy(), safe.numpy()])
    ranks = rankdata(both, axis=0)
    n_unsafe = len(unsafe)
    smallest_sum = n_unsafe * (n_unsafe + 1) / 2
    n_larger = ranks[:n_unsafe].sum(0) - smallest_sum
    n_pairs = n_unsafe * len(safe)
    return torch.from_numpy(n_larger / n_pairs)
