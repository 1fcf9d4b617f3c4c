"""`improve`, from two data sets to a confirmed edit and its page: what it refuses, and what a whole run holds."""

import csv
import dataclasses
import html
import json
import random
import re
import shlex
import shutil
import string
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from browser import needs_browser, opened
from page_figures import figures_of
from test_pages import ATTACKS, refuse_markup

from dean_interp import InputError, load_behaviour, load_model
from dean_interp.cli.main import main
from dean_interp.data.examples import prompt_hash
from dean_interp.information.estimands import HEADLINES
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.report.improve_page import improvement_rows, write_improve_report
from dean_interp.report.page import INTERVALS, interval, minus, row_digits, signed
from dean_interp.selection.gates import dosed, load_gates
from dean_interp.selection.gating import GatingConfig
from dean_interp.study import choosing, confirming, improve, settings, store
from dean_interp.study import improve_data as improve_data_module
from dean_interp.study.improve import run_improve
from dean_interp.study.improve_data import CONFIRMATIONS, improve_data
from dean_interp.study.improvement import ImproveConfig, Improvement, load_improvement
from dean_interp.study.results import load_record
from dean_interp.study.roles import RoleSizes, drawn_evenly, roles_of
from dean_interp.study.run_folder import CHECKSUMS, note_checksums
from dean_interp.study.settings import AnswerConfig, ModelConfig

N_TOPICS = 21


def words(name: object, n: int) -> str:
    draw = random.Random(str(name))
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=4)) for _ in range(n))


def write_set(path: Path, rows: list[dict[str, str]]) -> str:
    """A CSV file of rows with the same columns; its name as an option."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def pairs(name: str, n_topics: int = N_TOPICS, n_each: int = 3) -> list[dict[str, str]]:
    """Prompts with a safe and an unsafe answer of more than 12 tokens."""
    rows = []
    for topic in range(n_topics):
        for number in range(n_each):
            key = f"{name} {topic} {number}"
            answers = {"safe": f"no {words((key, 's'), 3)}", "unsafe": f"ok {words((key, 'u'), 3)}"}
            rows.append({"prompt": words(key, 8), **answers, "topic": f"{name} {topic}"})
    return rows


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, str]:
    """Two sets of pairs, one of plain answers, and a register set, all short."""
    folder = tmp_path_factory.mktemp("sets")
    plain = [{"prompt": row["prompt"], "response": row["safe"], "topic": row["topic"]} for row in pairs("general text")]
    made = {"one": pairs("one"), "two": pairs("two"), "plain": plain, "tone": pairs("tone", 8, 2)}
    return {name: write_set(folder / f"{name}.csv", rows) for name, rows in made.items()}


@pytest.fixture(scope="module")
def config(one_layer, sets) -> ImproveConfig:
    """A whole run that takes seconds."""
    return ImproveConfig(
        model=ModelConfig(str(one_layer), device="cpu"),
        first=sets["one"],
        second=sets["two"],
        general=sets["plain"],
        register=sets["tone"],
        max_kl=0.002,
        n_score=18,
        n_choose=10,
        n_confirm=20,
        n_flips=4,
        n_random=2,
        answers=AnswerConfig(over_refusal=(), n_answers=8, answer_lengths=(4,), n_answer_controls=1),
    )


def options(config: ImproveConfig) -> list[str]:
    """The same run on the command line."""
    return [
        "improve", "--model", config.model.name, "--device", "cpu", "--first", config.first, "--second", config.second,
        "--general", config.general, "--register", str(config.register), "--max-kl", str(config.max_kl),
        "--n-score", "18", "--n-choose", "10", "--n-confirm", "20", "--n-flips", "4", "--n-random", "2",
        "--n-answers", "8", "--answer-lengths", "4", "--n-answer-controls", "1", "--over-refusal",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory) -> tuple[Path, Improvement]:
    """The folder of that run, made by the command without interruption, and what it found."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*options(config), "--out", str(folder)]) == 0
    return folder, load_improvement(folder)


def test_the_report_links_the_page_of_the_strongest_neuron(finished):
    folder, improvement = finished
    name = improvement.neurons[0].name
    assert f'<a href="neurons/{name}.html">{name}</a>' in (folder / "report.html").read_text()
    page = (folder / "neurons" / f"{name}.html").read_text()
    assert name in page and "silenced" in page and page.count("<td>gain</td>") >= 2
    assert [path.name for path in (folder / "neurons").iterdir()] == [f"{name}.html"]


def last_line(capsys) -> str:
    said = capsys.readouterr()
    assert not said.out
    line = said.err.strip().splitlines()[-1]
    assert line.startswith("dean-interp: ") and "--debug" not in line
    return line


class EverythingChosen(Exception):
    """Everything is chosen."""


def chosen_and_no_more(config: ImproveConfig, folder: Path) -> None:
    """Run the steps up to the confirmation."""

    def stop(*_: object, **__: object) -> None:
        raise EverythingChosen

    with pytest.MonkeyPatch.context() as patch, pytest.raises(EverythingChosen):
        patch.setattr(improve, "earlier_confirmations", stop)
        run_improve(config, folder)


# What is refused, before a model is loaded.


def no_pairs(folder: Path) -> list[str]:
    rows = [{"prompt": row["prompt"], "response": row["safe"]} for row in pairs("x")]
    return ["--first", write_set(folder / "single.csv", rows)]


def one_topic(folder: Path) -> list[str]:
    return ["--first", write_set(folder / "narrow.csv", pairs("x", 1, 40))]


def few_topics(folder: Path) -> list[str]:
    return ["--first", write_set(folder / "narrow.csv", pairs("x", 8))]


def few_prompts(folder: Path) -> list[str]:
    rows = [{name: text for name, text in row.items() if name != "topic"} for row in pairs("x", 8, 1)]
    return ["--first", write_set(folder / "small.csv", rows)]


def pairs_for_general(folder: Path) -> list[str]:
    return ["--general", write_set(folder / "twofold.csv", pairs("x"))]


def rows_of_general(folder: Path) -> list[str]:
    general = load_behaviour("general", n_examples=None, split=None).examples
    rows = [{"prompt": row.prompt, "safe": "no", "unsafe": "yes", "topic": row.topic or ""} for row in general]
    return ["--first", write_set(folder / "mine.csv", rows)]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--first", "general"], "must be three different behaviours, got ('general', 'privacy', 'general')"),
        (["--second", "fairness"], "must be three different behaviours, got ('fairness', 'fairness', 'general')"),
        (no_pairs, "'single' has no prompt with a safe and an unsafe answer"),
        (no_pairs, "it needs the columns prompt,safe,unsafe"),
        (pairs_for_general, "'twofold' has a safe and an unsafe answer to each prompt: other text has one answer"),
        (one_topic, "'narrow' has only one topic, and of them 0 to score with; at least 6 are needed"),
        (
            few_topics,
            "'narrow' has 8 topics, and of them 2 to score with; at least 6 are needed to score: give data of 24",
        ),
        (few_prompts, "'small' has 8 prompts, and of them"),
        (rows_of_general, "'mine' and 'general' share "),
        (["--first", "gone.csv"], "no file gone.csv"),
        (["--max-kl", "0"], "--max-kl must be above 0 and finite, in nats per token, got 0"),
        (["--max-kl", "-1"], "--max-kl must be above 0"),
        (["--max-kl", "nan"], "--max-kl must be above 0"),
        (["--max-kl", "inf"], "--max-kl must be above 0 and finite"),
        (["--n-flips", "3"], "--n-flips must be even"),
        (["--n-flips", "2", "--n-answer-controls", "3"], "--n-answer-controls must be at most n_flips (2), got 3"),
        (["--score-tokens", "0"], "--score-tokens must be at least 1, got 0"),
        (["--n-score", "5"], "--n-score must be at least 6, got 5"),
        (["--certainty", "-1"], "certainty must be at least 0, got -1"),
        (["--count", "0"], "count must be at least 1, got 0"),
        (["--register", "privacy"], "register must be a set of its own, got 'privacy'"),
        (["--register", "over_refusal_privacy"], "'over_refusal_privacy' is no register set"),
        (["--over-refusal", "nothing"], "no behaviour 'nothing'"),
        (["--answer-lengths", "0"], "--answer-lengths must be at least 1"),
    ],
)
def test_each_mistake_is_one_line_before_a_model_is_loaded(given, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    words = given(tmp_path) if callable(given) else given
    assert main(["improve", "--out", str(tmp_path / "run"), *words]) == 2
    assert said in last_line(capsys) and not (tmp_path / "run").exists()


def test_a_judge_that_does_not_exist_is_told_before_anything_is_scored(config, tmp_path, capsys):
    assert main([*options(config), "--judges", "nobody", "--out", str(tmp_path / "run")]) == 2
    assert "no judge 'nobody'" in last_line(capsys) and not (tmp_path / "run" / "scores").exists()


def test_a_budget_that_cannot_be_reached_says_which_can_and_it_can_in_the_same_folder(config, tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--n-answers", "0", "--debug"]
    assert main([*options(config), "--max-kl", "50", *out]) == 2
    line = last_line(capsys)
    assert "max_kl=50.0 cannot be reached: with every gate at its limit the KL is " in line
    reachable = line.partition("Give at most ")[2]
    assert 0 < float(reachable) < 50
    budget = dataclasses.replace(config, max_kl=float(reachable), answers=AnswerConfig(n_answers=0))
    chosen_and_no_more(budget, tmp_path / "run")
    assert (tmp_path / "run" / "choose" / "states").is_dir()


def test_gains_that_are_all_uncertain_leave_no_neuron_and_the_line_says_what_to_loosen(config, tmp_path, capsys):
    assert main([*options(config), "--certainty", "1e6", "--out", str(tmp_path / "run")]) == 2
    line = last_line(capsys)
    assert "no neuron raises both one and two: every gain is 0 under these settings (lower certainty" in line


def test_a_flip_that_leaves_no_neuron_is_a_null_that_changes_nothing(config, tmp_path, monkeypatch):
    def empty(*_: object) -> None:
        raise choosing.NothingToChangeError("none")

    chosen = choosing.direction_of
    monkeypatch.setattr(choosing, "direction_of", lambda *given: empty() if given[2:] else chosen(*given))
    few = dataclasses.replace(config, n_flips=2, n_random=0, answers=AnswerConfig(n_answers=0), register=None)
    improvement = run_improve(few, tmp_path / "run")
    flips = improvement.of_kind("flip")
    assert [flip.n_units for flip in flips] == [0, 0] and [flip.kl for flip in flips] == [0, 0]
    assert all(change.mean == 0 for flip in flips for change in flip.change.values())


def test_swapped_labels_are_warned_of_where_the_model_strongly_prefers_unsafe(one_layer, config, tmp_path, caplog):
    """The likelier of two letters stands in for an answer that a model prefers."""
    model = load_model(one_layer, device="cpu")
    tokenizer, liking = native_tokenizer(model), {}
    for letter in string.ascii_lowercase:
        tokens = torch.tensor([tokenizer(f"<|user|>what?<|assistant|>{letter * 16}").input_ids])
        with torch.inference_mode():
            log_probs = model(tokens, return_type="logits").log_softmax(-1)
        liking[letter] = float(log_probs[0, -17:-1].gather(1, tokens[0, -16:, None]).mean())
    liked, disliked = max(liking, key=liking.__getitem__), min(liking, key=liking.__getitem__)
    rows = [{**row, "safe": liked * 16, "unsafe": disliked * 16} for row in pairs("right")]
    right = dataclasses.replace(config, first=write_set(tmp_path / "right.csv", rows))
    chosen_and_no_more(right, tmp_path / "a")
    assert "swapped" not in caplog.text
    swapped = [{**row, "safe": row["unsafe"], "unsafe": row["safe"]} for row in rows]
    wrong = dataclasses.replace(config, first=write_set(tmp_path / "wrong.csv", swapped))
    chosen_and_no_more(wrong, tmp_path / "b")
    assert "the model finds the unsafe answers of 'wrong' likelier than the safe ones" in caplog.text
    assert "are safe and unsafe swapped?" in caplog.text and "'two'" not in caplog.text


# Roles.


def test_no_prompt_has_two_roles_even_where_a_file_repeats_it_under_several_topics(tmp_path):
    rows = pairs("x", 40)
    repeated = [{**row, "topic": other["topic"]} for row, other in zip(rows[:60], reversed(rows), strict=False)]
    path = write_set(tmp_path / "mine.csv", rows + repeated)
    roles = roles_of(path, RoleSizes(score=200, choose=200, confirm=200))
    parts = [part.prompt_hashes for part in roles.all]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
    assert roles.n_left_out > 0 and roles.divided_by == "topic"


def test_prompts_of_the_papers_files_with_one_answer_are_left_out_and_counted(tmp_path, caplog):
    rows = pairs("x", 60, 1)
    single = [{"prompt": f"{row['prompt']} Alone?", "response": "no"} for row in rows[:7]]
    safe = [{"prompt": row["prompt"], "response": row["safe"]} for row in rows]
    unsafe = [{"prompt": row["prompt"], "response": row["unsafe"]} for row in rows]
    write_set(tmp_path / "x_fairness_safe.csv", safe + single)
    write_set(tmp_path / "x_fairness_unsafe.csv", unsafe)
    roles = roles_of(f"paper:fairness@{tmp_path}", RoleSizes(score=200, choose=200, confirm=200))
    assert sum(map(len, roles.all)) + roles.n_left_out == 60 and all(part.paired for part in roles.all)
    assert "60 of 67 prompts have a safe and an unsafe answer; the others are left out" in caplog.text


def test_the_papers_own_files_divide_into_roles(shared):
    roles = roles_of(f"paper:fairness@{shared / 'data'}", RoleSizes(score=200, choose=200, confirm=200))
    assert roles.divided_by == "prompt" and all(part.paired for part in roles.all)
    assert {part.split for part in roles.all} == {"calibration", "test"} and len(roles.confirm) > 40


def test_the_prompts_that_are_answered_neither_scored_nor_chose():
    config = ImproveConfig(n_score=40, n_choose=30, n_confirm=42)
    data = improve_data(config)
    seen = frozenset().union(*(part.prompt_hashes for part in (*data.scoring, *data.choosing)))
    assert len(data.prompts.all) == 5
    assert not any(seen & asked.prompt_hashes for asked in data.prompts.all)
    for asked, part in zip(data.prompts.harmful, data.confirming, strict=False):
        assert asked.prompt_hashes <= part.prompt_hashes and len(asked) == 24
    own = dataclasses.replace(config, answers=AnswerConfig(harmful=("over_refusal_privacy",), n_answers=4))
    assert [asked.name for asked in improve_data(own).prompts.harmful] == ["over_refusal_privacy"]


# A whole run.


@pytest.mark.slow
@pytest.mark.product
def test_a_whole_run_ends_with_a_page_whose_numbers_are_those_of_its_results(finished):
    folder, improvement = finished
    page = (folder / "report.html").read_text()
    written = load_record(Improvement, folder / "results.json", "results")
    assert (
        written == improvement
        and minus(improvement.headline) in page.replace("&#39;", "'")
        and page.count(INTERVALS) == 1
    )
    edit = improvement.edit
    row = next(row for row in re.findall(r"<tr.*?</tr>", page, re.DOTALL) if "<td>the edit</td>" in row)
    digits = row_digits(row.changes for row in improvement_rows(improvement))
    for name in improvement.behaviours:
        assert f"<td>{interval(edit.change[name], digits)}</td>" in row
        assert f"<td>{signed(improvement.original.margin[name])} (its margin)</td>" in page
    assert f"<td>{edit.perplexity:.1f}</td><td>{edit.kl:.3f}</td>" in row
    assert "<td>4 gates of flipped labels</td>" in page and "<td>2 random gates</td>" in page
    for condition in improvement.conditions:
        verdict = "holds" if condition.holds else "does not hold"
        assert f"{verdict}</span>\n<strong>{condition.name}</strong>: {minus(condition.text)}." in page
    for prediction in improvement.predictions:
        numbers = (prediction.fitted, prediction.held_out, prediction.measured, prediction.fit, prediction.curvature)
        row = page.partition("Predicted and measured")[2].partition(f"<td>{prediction.on}</td>")[2]
        assert [signed(number) for number in numbers] == re.findall(r"<td>([+−]?\d.*?)</td>", row)[:5]
    for neuron in improvement.neurons:
        assert re.search(rf"<td>(<a [^>]*>)?{neuron.name}(</a>)?</td><td>{neuron.multiplier:.3f}</td>", page)
        assert f"dean-interp neuron L{neuron.layer}.{neuron.index} --run {folder}" in page
    measured = page[page.index("Everything that was measured") : page.index("Which examples did what")]
    assert measured.count("<tr><td>") == len(edit.lines)
    effect, dose = figures_of(page)
    for state in improvement.states:
        for name in improvement.behaviours:
            (mean,) = effect.numbers("mean_nats_per_token", state=state.name, behaviour=name)
            assert mean == state.change[name].mean
    for point in improvement.curve:
        for name in improvement.behaviours:
            found = dose.numbers("mean_nats_per_token", dose=repr(point.dose), behaviour=name)
            assert found == [point.change[name].mean]
    n_chosen = improvement.roles[0].n_examples["choose"]
    assert "4 gates of flipped labels, 2 random gates" in effect.caption and f"n: {n_chosen} prompts" in dose.caption


@pytest.mark.slow
def test_the_page_shows_the_first_answers_and_keeps_the_rest_below(finished):
    folder, improvement = finished
    page, answers = (folder / "report.html").read_text(), improvement.answers
    assert answers is not None and list(answers.prompts) == ["one", "two", "plain"]
    for name, prompts in answers.prompts.items():
        part = page.partition(f"<h3>{name}</h3>")[2].partition("</details>")[0]
        seen, _, rest = part.partition("<details>")
        assert [prompt in seen for prompt in prompts] == [True] * 6 + [False] * 2
        assert all(prompt in rest for prompt in prompts[6:]) and "the other 2 answers" in rest
    assert "given by rules" in page and "docs/judges.md" in page


@pytest.mark.slow
def test_the_page_loads_nothing_and_gives_commands_that_parse(finished):
    folder, improvement = finished
    page = (folder / "report.html").read_text()
    linked = re.findall(r'(?:src|href)="(?!#|data:text/csv)([^"]+)"', page)
    assert linked == [f"neurons/{improvement.neurons[0].name}.html"], "nothing but a page beside it, to be opened"
    for command in (f"edit export {folder}/edit.safetensors", f"edit revert {folder}/edit.safetensors {folder}/edited"):
        assert f"dean-interp {command}" in page
    name = improvement.config.model.name
    assert f"dean-interp chat --model {name} --edit {folder}/edit.safetensors" in page
    assert f"<h1>Does one edit of {Path(name).name} raise both" in page


@needs_browser
@pytest.mark.slow
def test_a_real_browser_draws_the_page_with_the_network_blocked(finished, tmp_path):
    page = opened(finished[0] / "report.html", tmp_path)
    assert page.count("<svg") == 2 and page.count('class="sortable"') == 2


@pytest.mark.slow
def test_the_command_on_the_page_makes_the_same_run_again(finished, monkeypatch):
    """It parses to the same settings, and the finished folder says so: it is not done again."""
    folder, improvement = finished
    page = html.unescape((folder / "report.html").read_text())
    command = re.search(r"<code>(dean-interp improve .*?)</code>", page)
    assert command is not None
    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("the model was loaded again"))
    assert main(shlex.split(command[1])[1:]) == 0
    assert load_improvement(folder) == improvement


@pytest.mark.slow
def test_the_command_prints_the_headline_the_conditions_and_what_comes_next(finished, config, capsys):
    folder, improvement = finished
    again = [*options(config), "--out", str(folder)]
    assert main(again) == 0
    said = capsys.readouterr().out
    assert said.startswith(improvement.headline)
    assert all(f"{condition.name}: {condition.text}" in said for condition in improvement.conditions)
    for name in ("gates.safetensors", "results.json", "report.html"):
        assert str(folder / name) in said and (folder / name).is_file()
    assert said.count("dean-interp ") == 4
    assert main([*again, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["confirmed"] is improvement.confirmed is False, "4 flips cannot give p <= 0.05"
    assert record["headline"] == improvement.headline and len(record["conditions"]) == len(improvement.conditions)


@pytest.mark.slow
def test_report_writes_the_page_of_such_a_run_again_and_other_commands_refuse_it(finished, capsys):
    folder, _ = finished
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").read_bytes() == page
    capsys.readouterr()
    assert main(["report", str(folder), str(folder)]) == 2
    assert "a page that compares runs takes runs of `run` alone" in last_line(capsys)


def verified(folder: Path, capsys, *options: str) -> tuple[int, dict[str, str]]:
    """The exit code of `verify`, and what it says of each check."""
    capsys.readouterr()
    try:
        code = main(["verify", str(folder), "--json", *options])
    except SystemExit as ended:
        code = int(ended.code)
    return code, {check["what"]: check["match"] for check in json.loads(capsys.readouterr().out)["checks"]}


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--full"]])
def test_a_run_that_was_not_touched_is_verified_and_left_as_it_was(finished, capsys, options):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    code, found = verified(folder, capsys, *options)
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before
    assert code == 0 and {what.split(":")[0] for what in found} == {
        "files", "data", "model", "scores", "gates, from the kept scores", "measured", "results, from the kept files",
    }  # fmt: skip
    assert found["results, from the kept files"] == found["gates, from the kept scores"] == "same"
    assert {"scores: tone, effects of neurons", "measured: edit, one", "data: one (test), part 2"} <= {*found}


@pytest.mark.slow
def test_what_was_changed_in_a_run_is_found(finished, capsys, tmp_path):
    folder, improvement = finished
    copy = shutil.copytree(folder, tmp_path / folder.name)
    (copy / "results.json").write_text((folder / "results.json").read_text().replace(improvement.headline, "Better."))
    assert verified(copy, capsys) == (1, {"files": "different"})
    # Whoever notes the checksums anew is found by what the other files give.
    (copy / CHECKSUMS).unlink()
    note_checksums(copy)
    code, found = verified(copy, capsys)
    assert code == 1 and [what for what in found if found[what] == "different"] == ["results, from the kept files"]
    gates = load_gates(copy / "gates.safetensors")
    dosed(gates, 1.5).save(copy / "gates.safetensors")
    (copy / CHECKSUMS).unlink()
    note_checksums(copy)
    code, found = verified(copy, capsys)
    different = [what for what in found if found[what] == "different"]
    assert code == 1 and different == ["gates, from the kept scores", "measured: edit, one", "measured: edit, two"]


@pytest.mark.slow
def test_a_fault_is_named_and_a_run_without_nulls_or_answers_has_a_page(finished, tmp_path):
    _, improvement = finished
    preference = {**improvement.preference, "one": dataclasses.replace(improvement.kl, mean=-0.9, low=-1.0, high=-0.8)}
    strict = dataclasses.replace(improvement.config, max_kl=improvement.kl.mean / 2)
    changed = dataclasses.replace(improvement, config=strict, preference=preference, answers=None)
    page = write_improve_report(changed, tmp_path).read_text()
    assert "<strong>Fault:</strong> KL above the budget: " in page and "are safe and unsafe swapped?" in page
    assert "What the model answers" not in page and "nothing is said about their safety" in page
    alone = dataclasses.replace(improvement, states=improvement.states[:2], signs=(), conditions=())
    assert "so nothing is confirmed" in write_improve_report(alone, tmp_path).read_text()


@pytest.mark.slow
def test_a_run_without_any_null_is_never_confirmed(config, tmp_path):
    plain = dataclasses.replace(
        config, n_flips=0, n_random=0, register=None, answers=AnswerConfig(n_answers=0, n_answer_controls=0)
    )
    improvement = run_improve(plain, tmp_path / "run")
    assert not improvement.confirmed and "no gates of flipped labels were measured" in improvement.headline


@pytest.mark.slow
def test_text_that_would_be_markup_stays_text(finished, tmp_path):
    """Behaviours, answers, prompts, the model and an earlier folder, all named to break a page."""
    folder, _ = finished
    text = (folder / "results.json").read_text()
    for name, attack in zip(("one", "two", "plain"), ATTACKS, strict=False):
        text = text.replace(f'"{name}"', json.dumps(attack))
    (tmp_path / "results.json").write_text(text)
    improvement = load_improvement(tmp_path)
    answers = improvement.answers
    assert answers is not None
    prompts = {name: tuple(ATTACKS[i % len(ATTACKS)] for i in range(8)) for name in answers.prompts}
    states = []
    for state in answers.states:
        given = [dataclasses.replace(answered, answers=ATTACKS[:8]) for answered in state.sets]
        states.append(dataclasses.replace(state, sets=tuple(given)))
    everything = " ".join(ATTACKS)
    changed = dataclasses.replace(
        improvement,
        answers=dataclasses.replace(answers, prompts=prompts, states=tuple(states)),
        headline=everything,
        conditions=tuple(dataclasses.replace(each, text=everything) for each in improvement.conditions),
        config=dataclasses.replace(improvement.config, model=ModelConfig(everything)),
        earlier=(improve.EarlierConfirmation(everything, 3),),
    )
    path = write_improve_report(changed, tmp_path)
    page = refuse_markup(path.read_text(), 1)
    assert "{{7*7}}" in "".join(page.text) and "<script>" in "".join(page.text)


@pytest.mark.slow
@pytest.mark.product
@pytest.mark.parametrize(
    "kill", [(choosing, "dose_to_kl", 3), (confirming, "outcomes_of", 4)], ids=["flips", "confirming"]
)
def test_a_killed_run_goes_on_to_the_same_bytes(kill, config, finished, tmp_path, monkeypatch):
    where, name, at = kill
    whole, n_calls = getattr(where, name), 0

    def killed(*given: object, **options: object) -> object:
        nonlocal n_calls
        n_calls += 1
        if n_calls == at:
            raise KeyboardInterrupt
        return whole(*given, **options)

    command = [*options(config), "--out", str(tmp_path / "killed")]
    with monkeypatch.context() as patch:
        patch.setattr(where, name, killed)
        assert main(command) == 130
    assert not (tmp_path / "killed" / "results.json").exists()
    assert main(command) == 0
    for file in ("results.json", "gates.safetensors", "design.json"):
        assert (tmp_path / "killed" / file).read_bytes() == (finished[0] / file).read_bytes()


@pytest.mark.slow
@pytest.mark.product
def test_confirming_prompts_are_opened_only_after_everything_is_chosen(config, tmp_path, monkeypatch):
    """Everything that a model reads of the sets goes through `measure` and `importance`."""
    data, opened, folder = improve_data(config), [], tmp_path / "run"
    confirming = frozenset().union(*(part.prompt_hashes for part in data.confirming))
    measure, scored_once = store.measure, choosing.scored_once

    def note(prompts: list[str]) -> None:
        is_confirming = bool(confirming & set(map(prompt_hash, prompts)))
        opened.append((is_confirming, (folder / "gates.safetensors").is_file()))

    def spied(model: object, behaviours: list, **options: object) -> object:
        note([prompt for behaviour in behaviours for prompt in behaviour.prompts])
        return measure(model, behaviours, **options)

    def spied_scores(model: object, behaviour: object, *given: object, **options: object) -> object:
        note(behaviour.prompts)
        return scored_once(model, behaviour, *given, **options)

    monkeypatch.setattr(store, "measure", spied)
    monkeypatch.setattr(choosing, "scored_once", spied_scores)
    run_improve(dataclasses.replace(config, answers=AnswerConfig(n_answers=0, n_answer_controls=0)), folder)
    assert {is_chosen for is_confirming, is_chosen in opened if is_confirming} == {True}
    first = next(number for number, (is_confirming, _) in enumerate(opened) if is_confirming)
    assert first > 10 and not any(is_chosen for _, is_chosen in opened[:first])


@pytest.mark.slow
def test_a_second_run_on_the_same_prompts_lists_the_first_and_the_first_again_lists_none(config, finished):
    folder, improvement = finished
    assert improvement.earlier == () and "No run beside this one had opened any" in (folder / "report.html").read_text()
    again = dataclasses.replace(config, gating=GatingConfig(ridge=2.0), answers=AnswerConfig(n_answers=0))
    second = run_improve(again, folder.parent / "second")
    (earlier,) = second.earlier
    n_confirming = sum(role.n_examples["confirm"] for role in second.roles[:2])
    assert (earlier.folder, earlier.n_shared) == ("whole", n_confirming)
    page = write_improve_report(second, folder.parent / "second").read_text()
    assert f"{n_confirming} of the prompts that confirm were opened before, by the run <code>whole</code>" in page
    noted = json.loads((folder.parent / CONFIRMATIONS).read_text())
    assert list(noted) == ["whole", "second"] and set(noted["whole"]) == set(noted["second"])


def test_a_run_that_takes_the_name_of_one_that_is_gone_lists_it_as_an_earlier_look(config, tmp_path):
    data = improve_data(config)
    (tmp_path / "run").mkdir()
    assert improve.earlier_confirmations(tmp_path / "run", data) == ()
    assert improve.earlier_confirmations(tmp_path / "run", data) == (), "the same run, which goes on"
    (tmp_path / "run" / "earlier.json").unlink()
    (earlier,) = improve.earlier_confirmations(tmp_path / "run", data)
    assert earlier.folder == "run" and earlier.n_shared == len(data.first.confirm) + len(data.second.confirm)


def test_runs_that_begin_at_once_are_all_remembered(config, tmp_path, monkeypatch):
    """Each reads the others' notes before it writes: without a lock, the last one to write would be left alone."""
    data = improve_data(config)
    read = improve_data_module.read_json

    def slowly(*given: object) -> object:
        found = read(*given)
        time.sleep(0.05)
        return found

    monkeypatch.setattr(improve_data_module, "read_json", slowly)
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        counts = [len(found) for found in pool.map(lambda folder: improve.earlier_confirmations(folder, data), folders)]
    assert sorted(counts) == [0, 1, 2, 3]
    assert set(json.loads((tmp_path / CONFIRMATIONS).read_text())) == {"0", "1", "2", "3"}


def test_examples_are_drawn_evenly_over_topics():
    whole = load_behaviour("fairness", n_examples=None, split="test")
    drawn = drawn_evenly(whole, 42, seed=0)
    counts = Counter(example.topic for example in drawn.examples)
    assert len(counts) == 21 and set(counts.values()) == {2}
    assert drawn_evenly(whole, 42, seed=1).prompts != drawn.prompts, "the seed draws"
    assert sorted(drawn_evenly(whole, 999, seed=0).prompts) == sorted(whole.prompts)


def test_the_papers_rule_stands_beside_the_edit_with_mutual_information_under_both(config, tmp_path, monkeypatch):
    monkeypatch.setitem(settings.FRACTION, "neuron", 0.1751)
    asked = dataclasses.replace(config, paper_rule=True, n_flips=2, n_random=1, answers=AnswerConfig(n_answers=0))
    improvement = run_improve(asked, tmp_path / "run")
    assert list(improvement.information) == ["edit", "paper's rule"]
    for informations in improvement.information.values():
        assert [each.estimand for each in informations] == list(HEADLINES)
        for shift in informations[0].shifts:
            assert len(shift.control_changes) == 3, "two flips and one random null"
    edit, paper = (found[0].shifts[0] for found in improvement.information.values())
    assert edit.before.value == paper.before.value and min(edit.n_units) > 0, "the same neurons before either"
    page = write_improve_report(improvement, tmp_path / "run").read_text()
    assert "read before its gate" in page
    assert re.search(r"Paper&#39;s rule: (the largest standardised fall|no fall; the change that is lowest)", page)


def test_too_few_topics_for_the_folds_are_refused_first(config, tmp_path):
    many = dataclasses.replace(config, gating=GatingConfig(folds=7))
    with pytest.raises(InputError, match="7 folds need 14 topics or more; 'one' has"):
        run_improve(many, tmp_path / "run")


def test_too_few_prompts_for_mutual_information_are_refused_first(config, tmp_path):
    few = dataclasses.replace(config, paper_rule=True, n_confirm=6)
    with pytest.raises(
        InputError, match=r"12 distinct test prompts are too few for k=5 components a side .*: give at least 24"
    ):
        run_improve(few, tmp_path / "run")
