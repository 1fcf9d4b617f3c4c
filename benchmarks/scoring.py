"""What scoring and measuring cost, as ratios measured side by side in one process on the demo model.

    make bench

Each pair is run alternately, several times; the medians are compared, so a busy machine slows both sides alike.
"""

import statistics
import time
from collections.abc import Callable

import torch

from dean_interp import Scoring, importance, load_behaviour, load_model
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import answer_log_probs, answer_positions, batched, forward
from dean_interp.models.tokens import encode, paths, trees

N_EXAMPLES, REPEATS, BATCH_TOKENS = 16, 3, 2048


def ratio(numerator: Callable[[], object], denominator: Callable[[], object]) -> float:
    """Median time of one over median time of the other, run in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 1):
        for side, run in zip(times, (numerator, denominator), strict=True):
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                side.append(time.perf_counter() - start)
    return statistics.median(times[0]) / statistics.median(times[1])


def forward_and_backward(model: HookedModel, rows: list, *, parameters: bool) -> None:
    """A plain pass over the same padded batches: with parameter gradients, as the released code takes them, or none."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameters)
    hook = ("hook_embed", lambda embedded, hook: embedded.requires_grad_(True))
    for batch in batched(model, rows, batch_tokens=BATCH_TOKENS, label="plain"):
        with model.hooks(fwd_hooks=[] if parameters else [hook]), answer_positions(model, batch):
            logits = forward(model, batch)[0]
            torch.nn.functional.cross_entropy(logits, batch.target).backward()
        model.zero_grad(set_to_none=True)


def main() -> None:
    """Print every ratio."""
    torch.set_num_threads(2)
    model = load_model("smollm2-135m-instruct", device="cpu")
    behaviour = load_behaviour("fairness", n_examples=N_EXAMPLES)
    rows = paths([
        encode(model.tokenizer, prompt, [answer])
        for prompt, answer in zip(behaviour.prompts, behaviour.responses, strict=True)
    ])  # fmt: skip
    score = lambda: importance(model, behaviour, how=Scoring(batch_tokens=BATCH_TOKENS))  # noqa: E731
    for parameters, what in ((False, "without"), (True, "with")):
        cost = ratio(score, lambda parameters=parameters: forward_and_backward(model, rows, parameters=parameters))
        print(f"scoring neurons / plain forward and backward {what} parameter gradients: {cost:.2f}")
    tests = load_behaviour("fairness", n_examples=48, split="test")
    pairs = [encode(model.tokenizer, e.prompt, list(e.answers.values()), answer_tokens=16) for e in tests.examples]

    def margins(rows: list, batch_tokens: int = 1024) -> None:
        with torch.inference_mode():
            for batch in batched(model, rows, batch_tokens=batch_tokens, label="margins"):
                answer_log_probs(model, batch)

    cost = ratio(lambda: margins(paths(pairs)), lambda: margins(trees(pairs)))
    print(f"margins with every answer in a sequence of its own / with shared prompts: {cost:.2f}")
    for row_tokens in (128, 512):
        cost = ratio(lambda n=row_tokens: margins(trees(pairs, row_tokens=n)), lambda: margins(trees(pairs)))
        print(f"margins with rows of {row_tokens} tokens / of 256: {cost:.2f}")
    cost = ratio(lambda: margins(trees(pairs), 2048), lambda: margins(trees(pairs)))
    print(f"margins with batches of 2048 tokens / of 1024: {cost:.2f}")


if __name__ == "__main__":
    main()
