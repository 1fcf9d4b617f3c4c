"""The arms that are compared, in the order of the table. A new one is a file in this room, and an entry here."""

from dean_interp.arms.affine_maps import LinearTransport
from dean_interp.arms.arm import Arm
from dean_interp.arms.auroc_damping import AurocDamping
from dean_interp.arms.coupled_arms import PaperRuleArm, ReleasedArm
from dean_interp.arms.directional_ablation import DirectionalAblation
from dean_interp.arms.gate_arms import CLOSED_FORM, ITERATED, OF_IMPROVE
from dean_interp.arms.peft_arms import ADAPTER_ARMS
from dean_interp.arms.random_arms import RandomGatesArm, RandomNeuronsArm
from dean_interp.arms.signed_arms import SignedSilencingArm
from dean_interp.arms.steering import Steering
from dean_interp.arms.system_prompt import LONG, SHORT, SystemPromptArm

SHORT_PROMPT = SystemPromptArm("system prompt, short", SHORT)
LONG_PROMPT = SystemPromptArm("system prompt, long", LONG)
TOGETHER = ((SHORT_PROMPT, CLOSED_FORM),)
"""Prompts that are measured with an edit, too."""


def all_arms(n_random: int) -> list[Arm]:
    """Every arm, with so many random ones of each sort."""
    arms: list[Arm] = [
        PaperRuleArm("neuron"),
        PaperRuleArm("weight"),
        ReleasedArm(),
        SignedSilencingArm(),
        CLOSED_FORM,
        ITERATED,
        OF_IMPROVE,
        Steering(),
        DirectionalAblation(),
        LinearTransport(),
        AurocDamping(),
        SHORT_PROMPT,
        LONG_PROMPT,
        *ADAPTER_ARMS,
    ]
    arms += [RandomNeuronsArm(number) for number in range(1, n_random + 1)]
    arms += [RandomGatesArm(number) for number in range(1, n_random + 1)]
    return arms
