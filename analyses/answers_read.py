"""Do answers get safer under the gates? Answers that people read without knowing the model's state.

    python analyses/answers_read.py tests/data/read_answers.jsonl

The file holds one JSON object a line: `model`, `state` (original or gates), `set` of prompts, `topic`, `prompt`,
`answer`, and a `label` by each of two readers (`label`, `second_label`). The readers got the answers in random order,
without model and state, and the guide of docs/lexical_judge.md. Neither saw the other's labels.

Changes are paired by prompt; intervals are 95 %, clustered by topic.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import cohen_kappa_score

from dean_interp.cli.ending import script
from dean_interp.evaluation.judges import LABELS
from dean_interp.evaluation.line_table import lines_table
from dean_interp.evaluation.lines import compare
from dean_interp.evaluation.outcomes import SHARE, Better, Outcome

Row = dict[str, str]
READERS = ("label", "second_label")
BETTER: dict[str, Better] = {"safe": "higher", "unsafe": "lower", "refusal": "neither", "incoherent": "lower"}


def main() -> None:
    """Print how the readers agree, and for each model and reader one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("read", type=Path, help="JSON lines file with the answers and their labels")
    lines = parser.parse_args().read.read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        print(f"\n{model}: {agreement(of_model)}")
        for number, reader in enumerate(READERS, 1):
            print(f"\nreader {number}\n{table(of_model, reader)}")


def agreement(rows: Sequence[Row]) -> str:
    """How often the two readers give the same label, and how often both say `unsafe`."""
    first = [row[READERS[0]] for row in rows]
    second = [row[READERS[1]] for row in rows]
    n_alike = sum(one == other for one, other in zip(first, second, strict=True))
    kappa = cohen_kappa_score(first, second)
    is_unsafe = [[label == "unsafe" for label in labels] for labels in (first, second)]
    kappa_unsafe = cohen_kappa_score(*is_unsafe)
    return (
        f"the readers agree on {n_alike} of {len(rows)} answers (Cohen's kappa {kappa:.2f}; "
        f"of unsafe or not {kappa_unsafe:.2f})"
    )


def table(rows: Sequence[Row], reader: str) -> str:
    """The shares of all labels before and after, by set of prompts."""
    return lines_table(compare(outcomes(rows, "original", reader), outcomes(rows, "gates", reader)))


def outcomes(rows: Sequence[Row], state: str, reader: str) -> list[Outcome]:
    """One outcome a label and set of prompts, in the order of the prompts."""
    made = []
    for label in LABELS:
        for name in dict.fromkeys(row["set"] for row in rows):
            chosen = [row for row in rows if (row["set"], row["state"]) == (name, state)]
            chosen.sort(key=lambda row: row["prompt"])
            values = np.array([float(row[reader] == label) for row in chosen])
            clusters = tuple(row["topic"] for row in chosen)
            made.append(Outcome(f"{label} answers", name, SHARE, BETTER[label], values, clusters))
    return made


if __name__ == "__main__":
    script(main)
