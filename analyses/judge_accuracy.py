"""How often a judge agrees with a reader, on labelled answers of the demo model.

    python analyses/judge_accuracy.py tests/data/labelled_answers.jsonl
    python analyses/judge_accuracy.py tests/data/labelled_answers.jsonl --judge json:MODEL --out runs/judge

The first line asks the rules, the second a chat model (docs/judges.md names all judges).

The file holds one JSON object a line: `half` (development: the rules were written with it; test: labelled after they
were frozen), `state` of the model, `set` of prompts, `prompt`, `answer`, `label`, and where a second reader read it,
`second_label`. The readers saw no verdict, and the second no label.

Intervals are Wilson's, and each answer counts once: they say how the judge reads answers, and compare no states of a
model.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from sklearn.metrics import cohen_kappa_score, confusion_matrix

from dean_interp.cli.ending import script
from dean_interp.errors import InputError
from dean_interp.evaluation.judges import LABELS, Judge, judged, make_judge
from dean_interp.evaluation.judges.agreement import NO_VERDICT
from dean_interp.files import write_json
from dean_interp.statistics import proportion

HALVES = ("development", "test")
Row = dict[str, str]
"""One labelled answer, with the judge's `verdict`."""


def main() -> None:
    """Print each half, and the last one by state of the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path, help="JSON lines file with labelled answers")
    parser.add_argument("--judge", default="lexical", help="the judge, by its name (default: lexical)")
    parser.add_argument("--halves", nargs="+", choices=HALVES, default=HALVES, help="halves to judge (default: both)")
    parser.add_argument("--out", type=Path, help="folder for verdicts.json; a killed judge goes on from what is there")
    given = parser.parse_args()
    lines = given.labelled.read_text(encoding="utf-8").splitlines()
    rows: list[Row] = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["half"] in given.halves]
    if not rows:
        raise InputError(f"{given.labelled} holds no answer of the half {' or '.join(given.halves)}")
    judge = make_judge(given.judge, folder=given.out)
    print(judge.name)
    rows = with_verdicts(judge, rows)
    if given.out:
        write_json(given.out / "verdicts.json", rows)
    for half in given.halves:
        of_half = [row for row in rows if row["half"] == half]
        print(f"\n{half} half (n = {len(of_half)})\n{table(*labels_and_verdicts(of_half))}")
    print_states([row for row in rows if row["half"] == given.halves[-1]])
    print_second_reader([row for row in rows if "second_label" in row])


def with_verdicts(judge: Judge, rows: Sequence[Row]) -> list[Row]:
    """The rows with the judge's verdict on each answer."""
    verdicts = judged(judge, [row["prompt"] for row in rows], [row["answer"] for row in rows])
    return [row | {"verdict": verdict.label or NO_VERDICT} for row, verdict in zip(rows, verdicts, strict=True)]


def labels_and_verdicts(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The reader's labels and the judge's verdicts."""
    return [row["label"] for row in rows], [row["verdict"] for row in rows]


def print_states(rows: Sequence[Row]) -> None:
    """Print every label against every verdict, and the agreement in each state of the model."""
    labels, verdicts = labels_and_verdicts(rows)
    columns = (*LABELS, NO_VERDICT)
    print("\nlabels in rows, verdicts in columns: " + ", ".join(columns))
    print(confusion_matrix(labels, verdicts, labels=columns)[: len(LABELS)])
    agrees: dict[str, list[bool]] = {}
    for row in rows:
        agrees.setdefault(row["state"], []).append(row["label"] == row["verdict"])
    for state, of_state in agrees.items():
        print(f"{state}: agreement {share(sum(of_state), len(of_state))}")


def print_second_reader(rows: Sequence[Row]) -> None:
    """Print how the second reader agrees with the first one and with the judge, on the answers that both read."""
    if not rows:
        return
    first, verdicts = labels_and_verdicts(rows)
    second = [row["second_label"] for row in rows]
    print(f"\nthe second reader against the first (n = {len(rows)})\n{table(first, second)}")
    print(f"the judge against the second reader\n{table(second, verdicts)}")


def table(labels: Sequence[str], verdicts: Sequence[str]) -> str:
    """Precision and recall of each verdict, and the agreement on all labels and on `unsafe` alone."""
    pairs = list(zip(labels, verdicts, strict=True))
    lines = [f"{'verdict':<11} {'precision':<27} recall"]
    for label in LABELS:
        hits = pairs.count((label, label))
        lines.append(f"{label:<11} {share(hits, verdicts.count(label)):<27} {share(hits, labels.count(label))}")
    lines.append(f"all labels: {agreement(labels, verdicts)}")
    is_unsafe = [label == "unsafe" for label in labels]
    said_unsafe = [verdict == "unsafe" for verdict in verdicts]
    lines.append(f"unsafe or not: {agreement(is_unsafe, said_unsafe)}")
    return "\n".join(lines)


def agreement(labels: Sequence[str | bool], verdicts: Sequence[str | bool]) -> str:
    """The share on which two readings agree, and Cohen's kappa."""
    n_alike = sum(label == verdict for label, verdict in zip(labels, verdicts, strict=True))
    kappa = cohen_kappa_score(labels, verdicts)
    return f"agreement {share(n_alike, len(labels))}, Cohen's kappa {kappa:.2f}"


def share(hits: int, of: int) -> str:
    """A share with its 95 % Wilson interval."""
    if not of:
        return f"{'-':>24}"
    interval = proportion(hits, of)
    return f"{hits:>3}/{of:<3} {interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    script(main)
