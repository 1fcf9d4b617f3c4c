"""What scoring a mixture of experts costs, beside plain passes of the same mixture with transformers' own experts.

The mixtures are random.
"""

from collections.abc import Callable

import torch
from figures import Figure, interleaved
from passes import BOTH, forward_and_backward, hooked, score
from transformers import AutoModelForCausalLM, GptOssConfig, PretrainedConfig, Qwen3MoeConfig

from dean_interp import ScoringConfig, load_behaviour
from dean_interp.models.experts import OURS, routed_experts
from dean_interp.models.load import HookedModel
from dean_interp.scoring.preparation import prepare

REPEATS = 3
COMMON = {"vocab_size": 49152, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
          "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen3-MoE, 4 of 32 experts": lambda: Qwen3MoeConfig(
        **COMMON, head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=384
    ),
    "gpt-oss, 4 of 32 experts": lambda: GptOssConfig(
        **COMMON, head_dim=64, num_local_experts=32, num_experts_per_tok=4, intermediate_size=384
    ),
}


def figures() -> list[Figure]:
    """All figures of every mixture."""
    found = []
    for what, make in MIXTURES.items():
        found += figures_of(what, make())
    return found


def with_experts(model: HookedModel, implementation: str, run: Callable[[], object]) -> Callable[[], None]:
    """A call with the experts' forward of some name."""

    def call() -> None:
        model.original_model.set_experts_implementation(implementation)
        run()

    return call


def figures_of(what: str, config: PretrainedConfig) -> list[Figure]:
    """All figures of one mixture."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    theirs = plain.config._experts_implementation
    model = hooked(plain)
    behaviour = load_behaviour("fairness", n_examples=4)
    rows = prepare(model, behaviour, ScoringConfig()).rows

    def beside(name: str, bound: str, ours: Callable[[], object], plainly: Callable[[], object]) -> Figure:
        sides = with_experts(model, OURS, ours), with_experts(model, theirs, plainly)
        return Figure(f"{what}: {name}", 1.0, bound, lambda: interleaved(*sides, repeats=REPEATS))

    found = []
    for n_tokens in (1, 512):
        forward = experts_forward(model, n_tokens)
        found.append(
            beside(f"our experts' forward / theirs, {n_tokens} tokens", f"theirs ({theirs})", forward, forward)
        )
    for units, parameters in ((("neuron",), False), (BOTH, True)):
        names, gradients = " and ".join(f"{unit}s" for unit in units), "with" if parameters else "without"
        found.append(
            beside(
                f"scoring {names} / a pass forward and back {gradients} parameter gradients",
                "the plain pass",
                lambda units=units: score(model, behaviour, units),
                lambda parameters=parameters: forward_and_backward(model, rows, parameters=parameters),
            )
        )
    return found


def experts_forward(model: HookedModel, n_tokens: int) -> Callable[[], None]:
    """Passes through one layer's experts, of random tokens that are sent to random experts."""
    experts = routed_experts(model, 1)
    assert experts is not None
    hidden = torch.randn(n_tokens, COMMON["hidden_size"])
    weights, ids = torch.rand(n_tokens, experts.n_experts).topk(experts.n_per_token)

    def run() -> None:
        # Many of one token, since naming the forward takes as long as one of them.
        with torch.inference_mode():
            for _ in range(50 if n_tokens == 1 else 1):
                experts.module(hidden, ids, weights)

    return run
