"""Every study of `analyses/` in its quick form, on planted models or data whose answer is known."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from dean_interp import load_behaviour
from dean_interp.fine_tuning import FineTuning
from dean_interp.study.arms import LOSS, MARGIN
from dean_interp.study.config import StudyConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the trainer and its packages

SIZES = {"n_calibration": 24, "n_test": 12, "n_general_test": 8, "n_answers": 3, "max_new_tokens": 8, "device": "cpu",
         "answer_tokens": None}  # fmt: skip
TUNING = FineTuning(n_steps=24, every=4, batch_size=8, learning_rate=3e-3)


def answered(folder, name, safe, unsafe):
    """A built-in set's prompts with other answers."""
    rows = [
        {"prompt": one.prompt, "safe": safe, "unsafe": unsafe, "topic": one.topic, "split": split}
        for split in ("calibration", "test") for one in load_behaviour(name, n_examples=30, split=split).examples
    ]  # fmt: skip
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("conflict", [True, False])
def test_fine_tuning_lowers_the_other_behaviour_where_their_answers_conflict_and_not_where_they_agree(
    checkpoints, tmp_path, conflict
):
    import tradeoff_under_finetuning as study

    yes, no = "yes yes", "no no no"
    first = answered(tmp_path, "fairness", yes, no)
    second = answered(tmp_path, "privacy", *((no, yes) if conflict else (yes, no)))
    config = StudyConfig(model=str(checkpoints["llama"]), first=first, second=second, **SIZES)
    given = study.Tradeoff(tmp_path / "run", methods=("full", "lora"), quick=True, tuning=TUNING, study=config)
    results = study.run(given)
    assert list(results.arms) == [f"{method} on {on}" for method in ("full", "lora")
                                  for on in ("privacy", "fairness", "both")]  # fmt: skip
    for on, other in (("privacy", "fairness"), ("fairness", "privacy")):
        own, theirs = (results.change(f"full on {on}", MARGIN, name).change for name in (on, other))
        assert own.low > 0
        assert theirs.high < 0 if conflict else theirs.low > 0
    kind = "the trade-off appears" if conflict else "no trade-off"
    assert all(kind in text for text in results.said if "Full" in text) and len(results.said) == 4
    assert not (given.out / "tuned" / "full on both, seed 0").exists(), "checkpoints do not pile up"
    page = (given.out / "report.html").read_text()
    assert kind in page and LOSS in page and "<svg" in page and "Qwen2-7B-Instruct FFT -13/+5" in page
    monkey = dataclasses.replace(given)
    assert study.run(monkey) == results, "a finished study is read from its files"
