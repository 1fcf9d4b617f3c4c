"""Do answers get safer under the gates? They were labelled by a reader that did not know the model's state.

    python analyses/judged_blind.py tests/data/blind_answers.jsonl

The file holds one JSON object a line: `state` of the demo model, `set` of prompts, `topic`, `prompt`, `answer`, and the
reader's `label`; some have a `second_label`, of a reading on another occasion. The reader is a large language model. It
got the answers in random order and without states, with the guide of docs/lexical_judge.md.

Changes are paired by prompt; intervals are 95 %, clustered by topic. p is for a mean change of 0, by flipped signs of
topics; `p_holm` is adjusted over both sets of a label.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from dean_interp.cli.ending import script
from dean_interp.evaluation.judges import LABELS
from dean_interp.evaluation.line_table import lines_frame
from dean_interp.evaluation.lines import compare_each
from dean_interp.evaluation.outcomes import SHARE, Better, Outcome, averaged

Row = dict[str, str]
ORIGINAL = "original"
BETTER: dict[str, Better] = {"safe": "higher", "unsafe": "lower", "refusal": "neither", "incoherent": "lower"}
COLUMNS = ["metric", "on", "state", "n", "before", "after", "change", "low", "high", "p", "p_holm"]


def main() -> None:
    """Print every state against the original, and how two readings agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="JSON lines file with the answers and their labels")
    lines = parser.parse_args().answers.read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    print(in_words(changes(rows)))
    print(f"\nfrom the mean of the random gates to the gates\n{in_words(beyond_random(rows))}")
    print(f"\n{agreement([row for row in rows if 'second_label' in row])}")


def changes(rows: Sequence[Row]) -> pd.DataFrame:
    """One row a label, set of prompts and state: the share of the label before and after."""
    states = dict.fromkeys(row["state"] for row in rows if row["state"] != ORIGINAL)
    lines = compare_each(outcomes(rows, ORIGINAL), {state: outcomes(rows, state) for state in states})
    tables = [lines_frame(of_state).assign(state=state) for state, of_state in lines.items()]
    table = pd.concat(tables).reindex(columns=COLUMNS)
    return table.sort_values(["metric", "on"], kind="stable")


def beyond_random(rows: Sequence[Row]) -> pd.DataFrame:
    """The same for the gates, with each prompt's mean over all random gates in place of the original."""
    random = dict.fromkeys(row["state"] for row in rows if row["state"].startswith("random"))
    before = averaged([outcomes(rows, state) for state in random])
    lines = compare_each(before, {"gates": averaged([outcomes(rows, "gates")])})
    return lines_frame(lines["gates"]).assign(state="gates").reindex(columns=COLUMNS)


def in_words(table: pd.DataFrame) -> str:
    """A table as text."""
    return table.to_string(index=False, float_format="{:.3f}".format)


def outcomes(rows: Sequence[Row], state: str) -> list[Outcome]:
    """One outcome a label and set of prompts, in the order of the prompts."""
    made = []
    for label in LABELS:
        for name in dict.fromkeys(row["set"] for row in rows):
            chosen = [row for row in rows if (row["set"], row["state"]) == (name, state)]
            chosen.sort(key=lambda row: row["prompt"])
            values = np.array([float(row["label"] == label) for row in chosen])
            clusters = tuple(row["topic"] for row in chosen)
            made.append(Outcome(f"{label} answers", name, SHARE, BETTER[label], values, clusters))
    return made


def agreement(read_twice: Sequence[Row]) -> str:
    """How often two readings give the same label, and how far they agree beyond chance."""
    first = [row["label"] for row in read_twice]
    second = [row["second_label"] for row in read_twice]
    n_alike = sum(one == other for one, other in zip(first, second, strict=True))
    kappa = cohen_kappa_score(first, second)
    is_unsafe = [[label == "unsafe" for label in labels] for labels in (first, second)]
    return (
        f"two readings agree on {n_alike} of {len(first)} answers (Cohen's kappa {kappa:.2f}; "
        f"unsafe or not {cohen_kappa_score(*is_unsafe):.2f})"
    )


if __name__ == "__main__":
    script(main)
