"""What scoring a mixture of experts costs, beside plain passes of the same mixture with transformers' own experts.

    python benchmarks/mixtures.py

Random mixtures on one CPU thread. The two sides of a ratio run in turn, several times; time is the process's own CPU
time, so that other work on the machine does not count. Minimum, median and maximum are printed.
"""

import time
from collections.abc import Callable

import torch
from scoring import BOTH, forward_and_backward, ratios, score, show
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GptOssConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from dean_interp import ScoringConfig, load_behaviour, load_model
from dean_interp.models.demo import demo_model_folder
from dean_interp.models.experts import OURS, routed_experts
from dean_interp.models.load import HookedModel
from dean_interp.scoring.preparation import prepare

REPEATS = 7
COMMON = {"vocab_size": 49152, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
          "num_key_value_heads": 4, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
MIXTURES: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen3-MoE, 4 of 32 experts": lambda: Qwen3MoeConfig(
        **COMMON, head_dim=64, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=384
    ),
    "Qwen3-MoE, 8 of 128 experts": lambda: Qwen3MoeConfig(
        **COMMON, head_dim=64, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=192
    ),
    "gpt-oss, 4 of 32 experts": lambda: GptOssConfig(
        **COMMON, head_dim=64, num_local_experts=32, num_experts_per_tok=4, intermediate_size=384
    ),
    "Mixtral, 2 of 8 experts": lambda: MixtralConfig(
        **COMMON, num_local_experts=8, num_experts_per_tok=2, intermediate_size=1024
    ),
}


def with_experts(model: HookedModel, implementation: str, run: Callable[[], object]) -> Callable[[], None]:
    """A call with the experts' forward of some name."""

    def call() -> None:
        model.original_model.set_experts_implementation(implementation)
        run()

    return call


def mixture_bench(what: str, config: PretrainedConfig) -> None:
    """All ratios of one mixture."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config).eval()
    theirs = plain.config._experts_implementation
    model = load_model(plain, tokenizer=AutoTokenizer.from_pretrained(demo_model_folder()))
    behaviour = load_behaviour("fairness", n_examples=8)
    rows = prepare(model, behaviour, ScoringConfig()).rows

    def beside(name: str, ours: Callable[[], object], plain_pass: Callable[[], object], repeats: int = REPEATS) -> None:
        pair = with_experts(model, OURS, ours), with_experts(model, theirs, plain_pass)
        show(f"{what}: {name}", ratios(*pair, repeats=repeats, clock=time.process_time))

    for n_tokens in (1, 512):
        forward = experts_forward(model, n_tokens)
        beside(f"our experts' forward / theirs ({theirs}), {n_tokens} tokens", forward, forward, 3 * REPEATS)
    for units, parameters in ((("neuron",), False), (BOTH, True)):
        names = " and ".join(f"{unit}s" for unit in units)
        beside(
            f"scoring {names} / plain forward and backward with{'' if parameters else 'out'} parameter gradients",
            lambda units=units: score(model, behaviour, units),
            lambda parameters=parameters: forward_and_backward(model, rows, parameters=parameters),
        )


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for what, make in MIXTURES.items():
        mixture_bench(what, make())
