"""A tiny model with neurons that are built to help or hurt one behaviour or both, and data by topic."""

import json
from pathlib import Path

import numpy as np
import torch
from planted_coupling import WORDS
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dean_interp import AnswerConfig, ImproveConfig, ModelConfig

D_MODEL, D_MLP, LAYER = 24, 40, 0
HELPS_BOTH, HURTS_BOTH, HELPS_FIRST, HELPS_SECOND, OPPOSED, GENERAL = 3, 7, 11, 13, 17, 19
READS = {
    HELPS_BOTH: (1.0, 1.0, 0.0),
    HURTS_BOTH: (-1.0, -1.0, 0.0),
    HELPS_FIRST: (1.0, 0.0, 0.0),
    HELPS_SECOND: (0.0, 1.0, 0.0),
    OPPOSED: (1.0, -1.0, 0.0),
    GENERAL: (0.0, 0.0, 3.0),
}
"""What each planted neuron does after the letters f, p and g: writes so much of "Y, not N", or (the last) of "O"."""


def planted_model(tokenizer: PreTrainedTokenizerFast, *, n_ctx: int = 256) -> LlamaForCausalLM:
    """No attention: what follows a byte depends on that byte alone. After f or p come Y or N, after g comes O."""
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=len(tokenizer), max_position_embeddings=n_ctx)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    f, p, g, y, n, o = (tokenizer(letter).input_ids[0] for letter in "fpgYNO")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        for parameter in model.model.layers[0].mlp.parameters():
            parameter.mul_(6.0)
        embed, unembed = model.model.embed_tokens.weight, model.lm_head.weight
        embed[:, :6] = 0
        for axis, letter in enumerate((f, p, g)):
            embed[letter] = 0
            embed[letter, axis] = 1
        embed[:, 5] = 5  # the large part keeps the norm steady, and opens every gate
        unembed[:, 3:6] = 0
        unembed[y, 3], unembed[n, 3], unembed[o, 4] = 1.0, -1.0, 2.0
        mlp = model.model.layers[LAYER].mlp
        for neuron, reads in READS.items():
            mlp.gate_proj.weight[neuron] = 0
            mlp.gate_proj.weight[neuron, 5] = 0.5
            mlp.up_proj.weight[neuron] = 0
            mlp.up_proj.weight[neuron, :3] = torch.tensor(reads)
            mlp.down_proj.weight[:, neuron] = 0
            mlp.down_proj.weight[4 if neuron == GENERAL else 3, neuron] = 0.6
    return model


def write_data(folder: Path, *, n_topics: int, n_each: int, real: tuple[bool, bool], seed: int = 0) -> dict[str, str]:
    """Files of both behaviours and of general text, with topics. Where a behaviour is not real, its labels are drawn
    by topic: safe is Y in some topics and N in others, so that nothing about them goes over to new topics.
    """
    generator, paths = np.random.default_rng(seed), {}
    for number, (letter, name) in enumerate((("f", "first"), ("p", "second"), ("g", "general"))):
        rows = []
        for topic in range(n_topics):
            is_swapped = letter != "g" and not real[number] and generator.random() < 0.5
            for i in range(n_each):
                words = " ".join(generator.choice(WORDS, size=3 + i % 3))
                row = {"prompt": f"{words} {letter}{topic}.{i}?", "topic": f"{name}-{topic}"}
                row["split"] = "test" if topic % 2 else "calibration"
                # What follows differs from prompt to prompt: chance that gains and margins must be seen through.
                endings = ["".join(generator.choice([*"abcdehijklm"], size=3)) for _ in range(2)]
                if letter == "g":
                    row["response"] = f"gO{endings[0]}"
                else:
                    safe, unsafe = ("N", "Y") if is_swapped else ("Y", "N")
                    row |= {"safe": f"{letter}{safe}{endings[0]}", "unsafe": f"{letter}{unsafe}{endings[1]}"}
                rows.append(row)
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths[name] = str(path)
    return paths


def write_register(folder: Path) -> str:
    """A file of harmless prompts whose first answer is worded as safe answers begin, with Y, and whose second is not.

    They follow another letter than the behaviours' answers do, so the planted neurons say nothing of them.
    """
    rows = []
    for topic in range(16):
        row = {"prompt": f"a tone {topic} {WORDS[topic % len(WORDS)]}?", "topic": f"tone-{topic}"}
        row |= {"safe": f"bY{topic:03d}", "unsafe": f"bN{topic:03d}"}
        rows.append(row | {"split": "test" if topic % 2 else "calibration"})
    path = folder / "register.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def planted_settings(
    folder: Path, tokenizer: PreTrainedTokenizerFast, *, n_ctx: int = 256, template: str = "raw", **changes: int
) -> ImproveConfig:
    """The planted model and its data in a folder, both behaviours real, and the settings of an improvement on them."""
    planted_model(tokenizer, n_ctx=n_ctx).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    data = write_data(folder, n_topics=32, n_each=2, real=(True, True))
    sizes = {"n_score": 20, "n_choose": 12, "n_confirm": 32}
    return ImproveConfig(
        model=ModelConfig(str(folder / "model"), template=template, device="cpu"),
        first=data["first"],
        second=data["second"],
        general=data["general"],
        register=write_register(folder),
        answers=AnswerConfig(n_answers=0, n_answer_controls=0),
        **(sizes | changes),
    )
