"""Throughput of `generate` on a bridge, beside `transformers`' own batched `generate` on the same checkpoint.

    make bench        (or: python benchmarks/generation.py)

Both answer the same prompts greedily, padded on the left, in batches of the same size on two threads, in float32. Ours
sorts prompts by length and passes through hook points; transformers takes them in file order, in its default attention
(`sdpa`). The plain model in eager attention, which hooks need, stands beside: the difference is what hook points cost.
"""

import json
import time
from pathlib import Path

import torch
from scoring import show  # beside this file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dean_interp import generate, load_behaviour, load_model
from dean_interp.models.demo import DEMO_MODEL, demo_model_folder

REPEATS, N_PROMPTS, BATCH, NEW = 3, 64, 32, 64


def plainly(model: PreTrainedModel, tokenizer: AutoTokenizer, prompts: list[str]) -> list[str]:
    """Batched greedy answers as transformers' documentation shows them."""
    answers = []
    with torch.inference_mode():
        for start in range(0, len(prompts), BATCH):
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts[start : start + BATCH]]
            texts = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            given = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
            out = model.generate(**given, max_new_tokens=NEW, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            answers += tokenizer.batch_decode(out[:, given.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def main() -> None:
    """Three ways in turn, several times; ratios of neighbouring runs."""
    torch.set_num_threads(2)
    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = [*load_behaviour("fairness", n_examples=N_PROMPTS // 2, split="test").prompts,
               *load_behaviour("general", n_examples=N_PROMPTS // 2, split="test").prompts]  # fmt: skip
    hooked = load_model(DEMO_MODEL, device="cpu")
    plain, eager = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind).eval()
        for kind in ("sdpa", "eager")
    )
    runs = {
        "ours": lambda: generate(hooked, prompts, max_new_tokens=NEW, batch_size=BATCH),
        "sdpa": lambda: plainly(plain, tokenizer, prompts),
        "eager": lambda: plainly(eager, tokenizer, prompts),
    }
    found: dict[str, list[float]] = {"sdpa": [], "eager": []}
    for repeat in range(REPEATS + 1):
        speeds, answers = {}, {}
        for name, run in runs.items():
            began = time.perf_counter()
            answers[name] = run()
            n_tokens = sum(len(tokenizer(answer, add_special_tokens=False).input_ids) for answer in answers[name])
            speeds[name] = n_tokens / (time.perf_counter() - began)
        if repeat:
            for name, ratio in found.items():
                ratio.append(speeds["ours"] / speeds[name])
        else:
            alike = sum(one == other for one, other in zip(answers["ours"], answers["sdpa"], strict=True))
            print(f"answers alike: {alike} of {len(prompts)} (batches of other rows round differently)")
    summary = show("throughput of generate / of transformers' own", found["sdpa"])
    show("the same, transformers in eager attention", found["eager"])
    path = Path(__file__).with_name("latest.json")
    known = json.loads(path.read_text()) if path.is_file() else {}
    names = ("generation_vs_transformers_min", "generation_vs_transformers", "generation_vs_transformers_max")
    path.write_text(json.dumps(known | dict(zip(names, summary, strict=True)), indent=1) + "\n")


if __name__ == "__main__":
    main()
