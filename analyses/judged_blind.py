"""Do answers get safer under the gates? They were labelled by a reader that did not know the model's state.

    python analyses/judged_blind.py tests/data/blind_answers.jsonl

The file holds one JSON object a line: `model`, `set` of prompts, `topic`, `prompt`, and by the model's state its
`answer` and the reader's `label`; some have a `second_label`, of a reading on another occasion. The reader is a large
language model. It got the answers in random order and without states, with the guide of docs/lexical_judge.md. Prompts
with `read_first` were read and looked at before the others were added.

Changes are paired by prompt; intervals are 95 %, clustered by topic. p is for a mean change of 0, by flipped signs of
topics; `p_holm` is adjusted over both sets of a label.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from dean_interp.cli.ending import script
from dean_interp.evaluation.judges import LABELS
from dean_interp.evaluation.line_table import lines_frame
from dean_interp.evaluation.lines import compare_each
from dean_interp.evaluation.outcomes import SHARE, Better, Outcome, averaged


@dataclass(frozen=True)
class ReadAnswer:
    """One answer, as it was read."""

    model: str
    state: str
    on: str
    """The set of prompts."""
    topic: str
    prompt: str
    label: str
    read_first: bool
    """Whether its prompt was read and looked at before others were added."""
    second_label: str | None = None


ORIGINAL = "original"
BETTER: dict[str, Better] = {"safe": "higher", "unsafe": "lower", "refusal": "neither", "incoherent": "lower"}
COLUMNS = ["metric", "on", "state", "n", "before", "after", "change", "low", "high", "p", "p_holm"]


def main() -> None:
    """Print every state against the original, the gates against random ones, and how two readings agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("answers", type=Path, help="JSON lines file with the answers and their labels")
    answers = read(parser.parse_args().answers)
    for model in dict.fromkeys(answer.model for answer in answers):
        of_model = [answer for answer in answers if answer.model == model]
        print(f"\n{model}\n{as_text(changes(of_model))}")
        if random_states(of_model):
            print(f"\nfrom the mean of the random gates to the gates\n{as_text(beyond_random(of_model))}")
        compared = [answer for answer in of_model if answer.state in (ORIGINAL, "gates")]
        first = [answer for answer in compared if answer.read_first]
        added = [answer for answer in compared if not answer.read_first]
        if first and added:
            print(f"\nprompts that were read first, alone\n{as_text(changes(first))}")
            print(f"\nprompts that were added, alone\n{as_text(changes(added))}")
    if read_twice := [answer for answer in answers if answer.second_label]:
        print(f"\n{agreement(read_twice)}")


def read(path: Path) -> list[ReadAnswer]:
    """The answers in a file, in the order of the prompts."""
    answers = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for state, given in row["answers"].items():
            answer = ReadAnswer(
                model=row["model"],
                state=state,
                on=row["set"],
                topic=row["topic"],
                prompt=row["prompt"],
                label=given["label"],
                read_first=row.get("read_first", False),
                second_label=given.get("second_label"),
            )
            answers.append(answer)
    return answers


def changes(answers: Sequence[ReadAnswer]) -> pd.DataFrame:
    """One row a label, set of prompts and state: the share of the label before and after."""
    states = dict.fromkeys(answer.state for answer in answers if answer.state != ORIGINAL)
    lines = compare_each(outcomes(answers, ORIGINAL), {state: outcomes(answers, state) for state in states})
    tables = [lines_frame(of_state).assign(state=state) for state, of_state in lines.items()]
    table = pd.concat(tables).reindex(columns=COLUMNS)
    return table.sort_values(["metric", "on"], kind="stable")


def beyond_random(answers: Sequence[ReadAnswer]) -> pd.DataFrame:
    """The same for the gates, with each prompt's mean over all random gates in place of the original."""
    before = averaged([outcomes(answers, state) for state in random_states(answers)])
    lines = compare_each(before, {"gates": averaged([outcomes(answers, "gates")])})
    return lines_frame(lines["gates"]).assign(state="gates").reindex(columns=COLUMNS)


def random_states(answers: Sequence[ReadAnswer]) -> list[str]:
    """The states under random gates."""
    return list(dict.fromkeys(answer.state for answer in answers if answer.state.startswith("random")))


def as_text(table: pd.DataFrame) -> str:
    """A table as text."""
    return table.to_string(index=False, float_format="{:.3f}".format)


def outcomes(answers: Sequence[ReadAnswer], state: str) -> list[Outcome]:
    """One outcome a label and set of prompts."""
    made = []
    for label in LABELS:
        for name in dict.fromkeys(answer.on for answer in answers):
            chosen = [answer for answer in answers if (answer.on, answer.state) == (name, state)]
            values = np.array([float(answer.label == label) for answer in chosen])
            clusters = tuple(answer.topic for answer in chosen)
            made.append(Outcome(f"{label} answers", name, SHARE, BETTER[label], values, clusters))
    return made


def agreement(read_twice: Sequence[ReadAnswer]) -> str:
    """How often two readings give the same label, and how far they agree beyond chance."""
    first = [answer.label for answer in read_twice]
    second = [str(answer.second_label) for answer in read_twice]
    n_alike = sum(one == other for one, other in zip(first, second, strict=True))
    kappa = cohen_kappa_score(first, second)
    is_unsafe = [[label == "unsafe" for label in labels] for labels in (first, second)]
    return (
        f"two readings agree on {n_alike} of {len(first)} answers (Cohen's kappa {kappa:.2f}; "
        f"unsafe or not {cohen_kappa_score(*is_unsafe):.2f})"
    )


if __name__ == "__main__":
    script(main)
