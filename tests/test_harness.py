"""lm-eval on the hooked model, against the harness' own model class on the plain one. Tasks are local files."""

import json
import logging
from pathlib import Path

import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from dean_interp import InputError, Selection, Site, ablate, load_model
from dean_interp.evaluation.harness import TaskResult, run_harness, task_files_fingerprint
from dean_interp.models.notes import notes

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

QUESTIONS = [
    ("What do bees make?", ["honey", "glass", "snow"], 0),
    ("Which is a colour?", ["chair", "green", "spoon"], 1),
    ("How many legs has a spider?", ["two", "four", "eight"], 2),
    ("What falls from clouds?", ["rain", "bread", "iron"], 0),
    ("Where do fish live?", ["in trees", "in water", "in fire"], 1),
    ("What is read?", ["a stone", "a river", "a book"], 2),
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "gold": gold, "answer": choices[gold]}
            for question, choices, gold in QUESTIONS]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder / "rows.jsonl"}
test_split: test
"""
    (folder / "choice.yaml").write_text(f"""task: local_choice
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
{head}""")
    (folder / "written.yaml").write_text(f"""task: local_written
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
{head}""")
    return folder


def plainly(folder: Path, model: object, names: list[str], tasks: Path) -> dict:
    """What the harness itself says of a transformers model."""
    harness = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8, max_length=1024)
    return simple_evaluate(
        harness,
        tasks=names,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]


def likelihoods(samples: list[dict]) -> torch.Tensor:
    return torch.tensor([[float(one[0][0]) for one in sample["resps"]] for sample in samples])


def recorded(monkeypatch) -> list[dict]:
    """Every `samples` that the adapter's runs give, to look behind their numbers."""
    import lm_eval.evaluator as module

    real, kept = module.simple_evaluate, []

    def run(*args, **options):
        found = real(*args, **options)
        kept.append(found["samples"])
        return found

    monkeypatch.setattr(module, "simple_evaluate", run)
    return kept


def test_a_task_is_answered_greedily_whatever_the_settings_of_the_checkpoint_say(llama, tasks, monkeypatch):
    kept = recorded(monkeypatch)
    run_harness(llama, ["local_written"], folder=tasks)
    settings = llama.original_model.generation_config
    for field, value in {"repetition_penalty": 1.9, "num_beams": 3, "suppress_tokens": list(range(4, 120)),
                         "num_return_sequences": 2, "cache_implementation": "static"}.items():  # fmt: skip
        monkeypatch.setattr(settings, field, value)
    run_harness(llama, ["local_written"], folder=tasks)
    monkeypatch.setattr(notes(llama), "cache_is_right", False)
    run_harness(llama, ["local_written"], folder=tasks)
    answers = [[sample["resps"] for sample in samples["local_written"]] for samples in kept]
    assert answers[0] == answers[1] == answers[2] and llama.original_model.generation_config is settings


def test_the_adapter_agrees_with_the_harness_on_the_plain_model(tiny, checkpoints, tasks, request, monkeypatch):
    folder = checkpoints[request.node.callspec.params["tiny"]]
    kept = recorded(monkeypatch)
    found = run_harness(tiny, ["local_choice", "local_written"], folder=tasks)
    plain = plainly(
        folder, AutoModelForCausalLM.from_pretrained(folder).eval(), ["local_choice", "local_written"], tasks
    )
    ours, theirs = likelihoods(kept[0]["local_choice"]), likelihoods(plain["local_choice"])
    assert ours.shape == (6, 3) and torch.allclose(ours, theirs, atol=1e-3)
    answers = [[sample["resps"] for sample in samples["local_written"]] for samples in (kept[0], plain)]
    assert answers[0] == answers[1]
    assert [(one.task, one.metric, len(one.values)) for one in found] == [
        ("local_choice", "acc", 6),
        ("local_written", "exact_match", 6),
    ]
    assert found[0].values.tolist() == [sample["acc"] for sample in plain["local_choice"]]


def test_an_ablated_model_is_the_plain_model_with_weights_at_zero(llama, checkpoints, tasks, monkeypatch):
    folder = checkpoints["llama-gqa"]
    site = Site(1, "neurons")
    kept = recorded(monkeypatch)
    run_harness(llama, ["local_choice"], folder=tasks)
    with ablate(llama, Selection({site: torch.arange(0, 40, 2)}, {site: (40,)})):
        run_harness(llama, ["local_choice", "local_written"], folder=tasks)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    plain.model.layers[1].mlp.down_proj.weight.data[:, 0:40:2] = 0
    zeroed = plainly(folder, plain, ["local_choice", "local_written"], tasks)
    before, under = (likelihoods(samples["local_choice"]) for samples in kept)
    assert torch.allclose(under, likelihoods(zeroed["local_choice"]), atol=1e-3)
    assert not torch.allclose(under, before, atol=1e-2)
    assert [one["resps"] for one in kept[1]["local_written"]] == [one["resps"] for one in zeroed["local_written"]]


def test_the_model_is_left_as_it_was(llama, tasks):
    weights = {name: parameter.clone() for name, parameter in llama.named_parameters()}
    run_harness(llama, ["local_choice"], folder=tasks, limit=2)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in llama.named_parameters())


def test_an_exported_checkpoint_is_measured_like_the_model(llama, checkpoints, tasks):
    again = run_harness(load_model(checkpoints["llama-gqa"], device="cpu"), ["local_choice"], folder=tasks)
    assert [one.values.tolist() for one in again] == [
        one.values.tolist() for one in run_harness(llama, ["local_choice"], folder=tasks)
    ]


def test_limit_and_interval(llama, tasks):
    (found,) = run_harness(llama, ["local_choice"], folder=tasks, limit=4)
    assert isinstance(found, TaskResult) and found.interval.n_clusters == 4
    assert found.interval.mean == found.values.mean() and found.higher_is_better


def test_a_task_that_does_not_exist_is_refused_with_near_names(llama, tasks):
    with pytest.raises(InputError, match="no task 'local_choise'; near names: local_choice"):
        run_harness(llama, ["local_choise"], folder=tasks)
    with pytest.raises(InputError, match="at least one task"):
        run_harness(llama, [])


def test_without_the_harness_the_error_says_what_to_install(llama, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    with pytest.raises(InputError, match=r"dean_interp\[eval\]"):
        run_harness(llama, ["local_choice"])


@pytest.fixture(autouse=True)
def quiet_harness():
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def test_a_task_that_was_corrected_is_another_task(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "task.yaml").write_text("task: own")
    before = task_files_fingerprint(tmp_path)
    assert before == task_files_fingerprint(tmp_path) != ""
    (tmp_path / "own" / "task.yaml").write_text("task: corrected")
    assert task_files_fingerprint(tmp_path) != before
