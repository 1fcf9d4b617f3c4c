"""How often the lexical judge agrees with a reader, on labelled answers of the demo model.

    python analyses/judge_accuracy.py tests/data/labelled_answers.jsonl

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
from dean_interp.evaluation.judges import LABELS
from dean_interp.evaluation.judges.lexical import judge_name, lexical_labels
from dean_interp.statistics import proportion


def main() -> None:
    """Print both halves, and the test half by state of the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labelled", type=Path)
    rows = [json.loads(line) for line in parser.parse_args().labelled.read_text(encoding="utf-8").splitlines()]
    print(judge_name())
    for half in ("development", "test"):
        labels, verdicts = of_half(rows, half)
        print(f"\n{half} half (n = {len(labels)})\n{table(labels, verdicts)}")
    print_test_half(rows)
    print_second_reader([row for row in rows if "second_label" in row])


def print_test_half(rows: Sequence[dict[str, str]]) -> None:
    """Print every label against every verdict, and the agreement in each state of the model."""
    labels, verdicts = of_half(rows, "test")
    print("\nlabels in rows, verdicts in columns: " + ", ".join(LABELS))
    print(confusion_matrix(labels, verdicts, labels=LABELS))
    states = [row["state"] for row in rows if row["half"] == "test"]
    agrees: dict[str, list[bool]] = {}
    for state, label, verdict in zip(states, labels, verdicts, strict=True):
        agrees.setdefault(state, []).append(label == verdict)
    for state, of_state in agrees.items():
        print(f"{state}: agreement {share(sum(of_state), len(of_state))}")


def print_second_reader(rows: Sequence[dict[str, str]]) -> None:
    """Print how the second reader agrees with the first one and with the judge, on the answers that both read."""
    first = [row["label"] for row in rows]
    second = [row["second_label"] for row in rows]
    verdicts = lexical_labels([row["answer"] for row in rows])
    print(f"\nthe second reader against the first (n = {len(rows)})\n{table(first, second)}")
    print(f"the judge against the second reader\n{table(second, verdicts)}")


def of_half(rows: Sequence[dict[str, str]], half: str) -> tuple[list[str], list[str]]:
    """The reader's labels and the judge's verdicts on the answers of one half."""
    chosen = [row for row in rows if row["half"] == half]
    return [row["label"] for row in chosen], list(lexical_labels([row["answer"] for row in chosen]))


def table(labels: Sequence[str], verdicts: Sequence[str]) -> str:
    """Precision and recall of each verdict."""
    pairs = list(zip(labels, verdicts, strict=True))
    lines = [f"{'verdict':<11} {'precision':<27} recall"]
    for label in LABELS:
        hits = pairs.count((label, label))
        lines.append(f"{label:<11} {share(hits, verdicts.count(label)):<27} {share(hits, labels.count(label))}")
    agree = sum(label == verdict for label, verdict in pairs)
    lines.append(f"agreement {share(agree, len(pairs))}, Cohen's kappa {cohen_kappa_score(labels, verdicts):.2f}")
    return "\n".join(lines)


def share(hits: int, of: int) -> str:
    """A share with its 95 % Wilson interval."""
    if not of:
        return f"{'-':>24}"
    interval = proportion(hits, of)
    return f"{hits:>3}/{of:<3} {interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


if __name__ == "__main__":
    script(main)
