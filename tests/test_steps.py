"""The steps of the command line, one by one: each leaves a file for the next, and together they are the study."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from dean_interp import load_behaviour, load_scores, load_selection
from dean_interp.cli.main import main
from dean_interp.data.examples import prompt_hash
from dean_interp.evaluation.outcomes import MARGIN
from dean_interp.resume import Unfinished

N_SCORED, N_TEST = 12, 12


def said(capsys, *arguments) -> dict:
    """What a step prints with `--json`: one object and nothing else on standard output."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def model(checkpoints):
    return ["--model", str(checkpoints["llama-gqa"]), "--device", "cpu"]


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Scores of three behaviours and the neurons that are coupled in them, made by the command."""
    folder = tmp_path_factory.mktemp("steps")
    scores = [folder / "scores" / f"{name}.safetensors" for name in ("fairness", "privacy", "general")]
    for path in scores:
        options = ["--n-calibration", str(N_SCORED), "--unit", "neuron", "weight", "--keep", "0.1", "--out", str(path)]
        assert main(["score", path.stem, *options, *model]) == 0
    selection = folder / "coupled.safetensors"
    assert main(["couple", *map(str, scores), "--fraction", "0.075", "--out", str(selection)]) == 0
    return folder, scores, selection


@pytest.fixture
def study(finished_study):
    """The whole study on the same model, data and fractions."""
    return finished_study[1]


@pytest.fixture(scope="module")
def measuring(model, files):
    _, scores, _ = files
    sizes = ["--n-test", N_TEST, "--n-general-test", N_TEST, "--n-random", 3, "--n-equal-kl", 1]
    sizes += ["--information-fraction", 0.3]
    return [*model, *sizes, "--scores", *scores]


@pytest.fixture(scope="module")
def asked(files):
    """Short answers, and text of a few windows."""
    text = files[0] / "text.txt"
    text.write_text("A pawn that reaches the last rank becomes a queen. " * 20)
    return ["--n-answers", 12, "--answer-lengths", 4, 8, "--n-answer-controls", 1, "--text", text, "--window", 200]


@pytest.fixture(scope="module")
def evaluated(files, measuring, asked, tmp_path_factory):
    """The folder of an evaluation that ran without interruption. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("evaluated") / "whole"
    assert main([*map(str, ["evaluate", files[2], "--out", folder, *measuring, *asked])]) == 0
    return folder


def test_couple_gives_the_selection_and_the_sizes_of_the_study(files, study, tmp_path, capsys):
    _, scores, selection = files
    record = said(capsys, "couple", *scores, "--fraction", 0.075, "--out", tmp_path / "again.safetensors")
    sizes = list(record["sizes"].values())
    assert sizes == list(study.of("neuron").sizes.values()) and list(record["sizes"])[-1] == record["expression"]
    assert sum(record["selected_per_site"].values()) == len(load_selection(selection)) == sizes[-1] > 0


def test_couple_takes_a_fraction_for_each_behaviour_and_either_unit(files, tmp_path, capsys):
    _, scores, _ = files
    options = ["--unit", "weight", "--fraction", 0.03, 0.03, 0.01, "--out", tmp_path / "weights.safetensors"]
    record = said(capsys, "couple", *scores, *options)
    assert record["unit"] == "weight" and record["fractions"] == [0.03, 0.03, 0.01]
    first, second, general, *_ = record["sizes"].values()
    assert general < first == second


def test_couple_takes_an_expression_over_any_number_of_behaviours(files, tmp_path, capsys):
    _, scores, _ = files
    names = [load_scores(path).behaviour for path in scores]
    expression = f"({names[0]} | {names[1]}) - {names[2]}"
    options = ["--expression", expression, "--count", 5, "--within", "model", "--out", tmp_path / "chosen.safetensors"]
    record = said(capsys, "couple", *scores, *options)
    assert record["count"] == 5 and [record["sizes"][name] for name in names] == [5, 5, 5]
    assert len(load_selection(tmp_path / "chosen.safetensors")) == record["sizes"][expression] > 0
    for wrong, message in (("fairness +", "cannot read the expression"), ("nobody", "no behaviour 'nobody'")):
        command = ["couple", *scores, "--expression", wrong, "--count", 5, "--out", tmp_path / "no.safetensors"]
        assert main([*map(str, command)]) == 2 and message in capsys.readouterr().err
    command = ["couple", *scores, "--fraction", 0.1, "--count", 5, "--out", tmp_path / "no.safetensors"]
    assert main([*map(str, command)]) == 2 and "give --fraction or --count, not both" in capsys.readouterr().err
    assert main([*map(str, ["couple", *scores[:2], "--out", tmp_path / "no.safetensors"])]) == 2
    assert "2 score files need an --expression" in capsys.readouterr().err


def test_evaluate_finds_the_margins_and_controls_of_the_study(study, evaluated):
    record = json.loads((evaluated / "evaluation.json").read_text())
    found = {state["name"]: state for state in record["states"]}
    assert list(found) == ["edit", "random 1", "random 2", "random 3", "equal KL 1"]
    for name in ("edit", "random 1", "random 3", "equal KL 1"):
        expected = study.of("neuron").state(name)
        margins = [line for line in found[name]["lines"] if line["metric"] == MARGIN]
        assert [line["on"] for line in margins] == ["fairness", "privacy"]
        for line in margins:
            assert line["after"]["mean"] == pytest.approx(expected.margin[line["on"]], abs=1e-5)
            assert line["change"]["low"] == pytest.approx(expected.change[line["on"]].low, abs=1e-5)
        assert found[name]["kl"] == pytest.approx(expected.kl, rel=1e-3)
    assert set(record["primary"]["p"]) == {"fairness", "privacy"}


def test_evaluate_puts_awareness_and_ability_in_one_table(files, measuring, asked, tmp_path, capsys):
    _, _, selection = files
    assert (
        main([*map(str, ["evaluate", selection, "--out", tmp_path, *measuring, *asked, "--judges", "lexical", "self"])])
        == 0
    )
    told = capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    lines = {(line["metric"], line["on"]): line for line in record["states"][0]["lines"]}
    for metric in ("margin of safe over unsafe", "safe answers (lexical), at 4 tokens", "refusals, at 8 tokens"):
        assert {on for name, on in lines if name == metric} == {"fairness", "privacy"} and metric in told
    assert ("over-refusal, at 8 tokens", "over_refusal_privacy") in lines
    assert ("plain answers to benign questions, at 8 tokens", "general") in lines
    loss, kl = (lines[f"{name} on windows of text", str(files[0] / "text.txt")] for name in ("loss", "KL"))
    assert loss["n"] == 5 and kl["before"]["mean"] == 0 < kl["after"]["mean"]
    assert len(lines["margin of safe over unsafe", "fairness"]["control_changes"]) == 4
    assert len(lines["over-refusal, at 8 tokens", "over_refusal_privacy"]["control_changes"]) == 1
    assert 0 < lines["margin of safe over unsafe", "privacy"]["rank"] <= 1
    missing = sum(record["judge_faults"]["self"].values())
    lexical, own = record["sensitivity"]["changes"]
    assert lexical["n_missing"] == 0 and own["n_missing"] == missing and "Not every judge has a verdict" in told
    assert missing and f"self: no verdict in {missing} answers" in told, "a random model judges nothing"
    design = json.loads((tmp_path / "design.json").read_text())
    assert design == record["design"] and design["detectable"].keys() >= {f"{metric} / {on}" for metric, on in lines}


def test_a_killed_evaluation_goes_on_to_the_same_table(
    files, evaluated, measuring, asked, tmp_path, capsys, monkeypatch
):
    _, _, selection = files
    whole = json.loads((evaluated / "evaluation.json").read_text())

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dean_interp.study.conclusions.compare", killed)
        command = ["evaluate", selection, "--out", tmp_path / "cut", *measuring, *asked]
        assert main([*map(str, command)]) == 130
    capsys.readouterr()
    monkeypatch.setattr("dean_interp.study.answering.generate_to", lambda *_, **__: pytest.fail("answered again"))
    assert said(capsys, "evaluate", selection, "--out", tmp_path / "cut", *measuring, *asked) == whole


def test_evaluate_leaves_scored_prompts_out_and_says_so(files, measuring, asked, tmp_path, capsys):
    _, _, selection = files
    scored = sorted(load_selection(selection).prompt_hashes)
    rows = load_behaviour("fairness", n_examples=N_SCORED).examples
    fresh = load_behaviour("fairness", n_examples=14, split="test").examples
    path = tmp_path / "questions.jsonl"
    near = dataclasses.replace(rows[2], prompt=f"{rows[2].prompt} Please tell me now.")
    some = (*rows[:5], near, *fresh)
    path.write_text("".join(json.dumps({"prompt": one.prompt, **one.answers}) + "\n" for one in some))
    assert scored
    options = ["--harmful", path, "--scored-data", "fairness"]
    record = said(capsys, "evaluate", selection, "--out", tmp_path, *measuring, *asked, *options)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == record
    assert record["n_left_out"]["questions"] == 6
    (line,) = (
        one for one in record["states"][0]["lines"] if one["metric"].startswith("safe answers") and "8" in one["metric"]
    )
    assert line["n"] + line["n_missing"] == 12


def test_the_test_part_of_calibration_data_is_not_left_out(files, measuring, asked, tmp_path, capsys):
    """The units were scored on half of a file, and the other half is measured."""
    _, _, selection = files
    path = tmp_path / "whole.jsonl"
    rows = [
        one
        for split in ("calibration", "test")
        for one in load_behaviour("fairness", n_examples=14, split=split).examples
    ]
    path.write_text("".join(json.dumps({"prompt": one.prompt, **one.answers}) + "\n" for one in rows))
    n_scored = sum(prompt_hash(one.prompt) in load_selection(selection).prompt_hashes for one in rows)
    record = said(
        capsys, "evaluate", selection, "--out", tmp_path, *measuring, *asked, "--harmful", path, "--scored-data", path
    )
    assert 0 < n_scored == record["n_left_out"]["whole"]


def test_calibration_data_that_was_not_scored_is_refused(files, measuring, asked, tmp_path, capsys):
    _, _, selection = files
    command = ["evaluate", selection, "--out", tmp_path, *measuring, *asked, "--scored-data", "over_refusal_privacy"]
    assert main([*map(str, command)]) == 2
    assert "no prompt of 'over_refusal_privacy' was" in capsys.readouterr().err


def test_evaluate_without_scores_has_no_controls_and_says_how_to_get_them(files, model, tmp_path, capsys):
    _, _, selection = files
    sizes = ["--n-test", "12", "--n-general-test", "12", "--n-answers", "0", "--window", "1000"]
    assert main(["evaluate", str(selection), "--out", str(tmp_path), *model, *sizes]) == 0
    assert "no random ablations were measured (for a selection give --scores)" in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text())["primary"] is None


def test_information_finds_that_of_the_study_and_shares_the_states_of_evaluate(
    files, study, evaluated, measuring, tmp_path, capsys, monkeypatch
):
    _, _, selection = files
    shutil.copytree(evaluated, tmp_path / "again")
    monkeypatch.setattr("dean_interp.study.store.measure", lambda *args, **options: pytest.fail("measured again"))
    record = said(capsys, "information", selection, "--out", tmp_path / "again", *measuring)
    assert set(record) == {"downstream_mi", "awareness_mi"}
    expected = study.of("neuron").information[0]
    for shift, there in zip(record["downstream_mi"]["shifts"], expected.shifts, strict=True):
        assert shift["before"]["value"] == pytest.approx(there.before.value, abs=1e-6)
        assert shift["after"]["value"] == pytest.approx(there.after.value, abs=1e-6)
        assert shift["control_changes"] == pytest.approx(there.control_changes)
        assert len(shift["control_changes"]) == 4


def test_a_folder_of_other_states_is_refused(files, evaluated, measuring, asked, capsys):
    _, _, selection = files
    command = ["evaluate", selection, "--out", evaluated, *measuring, *asked, "--answer-tokens", 3]
    assert main([*map(str, command)]) == 2
    assert "is of another model, other data or other units: choose another folder" in capsys.readouterr().err


def test_ablate_shows_both_answers_with_their_verdicts(files, model, tmp_path, capsys):
    _, scores, _ = files
    selection, out = tmp_path / "many.safetensors", tmp_path / "answers.json"
    said(capsys, "couple", *scores, "--fraction", 0.9, 0.9, 0.05, "--out", selection)
    asked = ["--prompts", "May I?", "And now?", "--answer-length", 4, "--out", out]
    record = said(capsys, "ablate", selection, *asked, *model)
    assert [row["prompt"] for row in record["answers"]] == ["May I?", "And now?"]
    assert json.loads(out.read_text()) == record
    assert record["n_units"] == len(load_selection(selection))
    assert any(row["before"] != row["under"] for row in record["answers"])
    assert {path.name for path in tmp_path.iterdir()} == {"answers.json", "many.safetensors"}
    assert (
        main(["ablate", str(selection), "--behaviour", "privacy", "--n-prompts", "2", "--answer-length", "2", *model])
        == 0
    )
    assert capsys.readouterr().out.count("under  (") == 2


def test_score_says_what_it_wrote(files, model, tmp_path, capsys):
    _, scores, _ = files
    out = tmp_path / "again.safetensors"
    record = said(
        capsys,
        "score",
        "fairness",
        "--n-calibration",
        N_SCORED,
        "--unit",
        "neuron",
        "weight",
        "--keep",
        0.1,
        "--out",
        out,
        *model,
    )
    assert record["fingerprint"] == load_scores(scores[0]).fingerprint
    assert record["units"] == ["neuron", "weight"] and record["n_examples"] == N_SCORED
    assert out.read_bytes() == scores[0].read_bytes()


def test_a_killed_score_goes_on_from_its_last_batch(model, tmp_path, monkeypatch):
    out, kept = tmp_path / "killed.safetensors", []
    command = [
        "score",
        "fairness",
        "--n-calibration",
        str(N_SCORED),
        "--unit",
        "neuron",
        "weight",
        "--score-tokens",
        "512",
    ]
    command += ["--out", str(out), *model]
    keep = Unfinished.keep

    def keep_and_die(self, sums, *, n_batches):
        keep(self, sums, n_batches=n_batches)
        kept.append(n_batches)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Unfinished, "keep", keep_and_die)
        assert main(command) == 130
    assert not out.exists()
    monkeypatch.setattr(Unfinished, "keep", lambda self, sums, n_batches: kept.append(n_batches))
    assert main(command) == 0
    assert kept[2] == 3, "it began at the third batch"
    assert not out.with_suffix(".unfinished").exists()


def test_an_edit_goes_from_selection_to_checkpoint_and_back(files, model, tmp_path, capsys):
    _, _, selection = files
    folder, edit = Path(model[1]), tmp_path / "edit.safetensors"
    assert model[0] == "--model" and folder.is_dir()
    made = said(capsys, "edit", "create", selection, "--out", edit, *model)
    assert made["units"] and made["bytes"] == edit.stat().st_size and made["value"] == "Zero"
    assert made["super_weights"] == []
    shown = said(capsys, "edit", "show", edit)
    assert shown == {name: value for name, value in made.items() if name not in ("out", "bytes", "super_weights")}
    assert main(["edit", "show", str(edit)]) == 0
    text = capsys.readouterr().out
    assert ", set to 0; digest" in text and "prompts" not in text
    assert said(capsys, "edit", "verify", edit, folder)["state"] == "base"
    said(capsys, "edit", "apply", edit, folder, "--out", tmp_path / "edited")
    assert said(capsys, "edit", "verify", edit, tmp_path / "edited")["state"] == "edited"
    said(capsys, "edit", "revert", edit, tmp_path / "edited", "--out", tmp_path / "reverted")
    for file in folder.iterdir():
        assert (tmp_path / "reverted" / file.name).read_bytes() == file.read_bytes()
    half = tmp_path / "half.safetensors"
    said(capsys, "edit", "create", selection, "--value", 0.5, "--out", half, *model)
    assert said(capsys, "edit", "diff", edit, half)["in_all"]["different"] > 0
    with pytest.raises(SystemExit) as ended:
        main(["edit", "verify", str(half), str(tmp_path / "edited")])
    assert ended.value.code == 1 and "is neither the base of this edit nor its result" in capsys.readouterr().out
    exported = said(capsys, "edit", "export", edit, "--out", tmp_path / "exported", *model)
    assert exported["largest_difference"] <= 1e-5 * exported["largest_logit"]
    assert main(["edit", "stack", str(edit), str(half), "--out", str(tmp_path / "both.safetensors")]) == 2
    assert "cannot be stacked" in capsys.readouterr().err
    assert main(["edit", "apply", str(edit), str(tmp_path / "edited"), "--out", str(tmp_path / "twice")]) == 2
    assert "holds this edit already" in capsys.readouterr().err and not (tmp_path / "twice").exists()
    assert (
        said(capsys, "edit", "stack", edit, edit, "--out", tmp_path / "both.safetensors")["numbers"] == made["numbers"]
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "fairness", "--out", "/proc/nowhere/s.safetensors"], "cannot write to /proc/nowhere/s.safetensors"),
        (["score", "fairnes", "--out", "s.safetensors"], "no behaviour 'fairnes'"),
        (["couple", "a", "b", "c", "--out", "d"], "no scores file a"),
        (["ablate", "gone.safetensors"], "no selection file gone.safetensors"),
        (["evaluate", "gone.safetensors", "--out", "e"], "no file gone.safetensors"),
        (["report", "gone"], "no run folder gone"),
        (["verify", "gone"], "no run folder gone"),
        (["pages", "gone"], "no run folder gone"),
        (["edit", "card", "gone", "--out", "c/README.md"], "no edit file gone"),
        (["neuron", "L0.1", "--run", "gone"], "no run folder gone"),
        (["neuron", "L0.1", "--run", "."], "no run in .: config.json is missing"),
        (["neuron", "L0.1", "--out", "."], "is a folder, and the name of a file is wanted"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dean_interp.study.settings.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(arguments) == 2
    assert not [*tmp_path.iterdir()], "a mistake leaves nothing"
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("dean-interp: ") and captured.err.count("\n") == 1
    assert message in captured.err


def test_information_without_scores_and_scores_of_two_behaviours_are_refused(files, tmp_path, capsys):
    _, scores, selection = files
    assert main(["information", str(selection), "--out", str(tmp_path)]) == 2
    assert "information needs the scores of first, second and general" in capsys.readouterr().err
    assert main(["evaluate", str(selection), "--out", str(tmp_path), "--scores", *map(str, scores[:2])]) == 2
    assert "scores must be those of first, second and general, or none; got 2" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--value", "mean"], ["--scores", "s.safetensors"]])
def test_means_need_scores_and_scores_need_means(files, options, tmp_path, capsys):
    _, _, selection = files
    for command in (["ablate", selection], ["edit", "create", selection, "--out", tmp_path / "edit.safetensors"]):
        assert main([*map(str, command), *options]) == 2
        assert "--value mean and --scores go together" in capsys.readouterr().err


def test_units_are_set_to_their_means_from_a_score_file(files, model, capsys):
    _, scores, selection = files
    options = ["--value", "mean", "--scores", scores[2], "--prompts", "May I?", "--answer-length", 2]
    assert said(capsys, "ablate", selection, *options, *model)["value"] == "Mean"
    assert main([*map(str, ["ablate", selection, "--value", "half", "--prompts", "May I?", *model])]) == 2
    assert "a value is a finite number (0 silences) or 'mean', got 'half'" in capsys.readouterr().err


def test_a_run_names_its_model(tmp_path, capsys):
    assert main(["neuron", "L0.1", "--run", str(tmp_path), "--model", "another"]) == 2
    assert "--run takes model, template and dtype from the run" in capsys.readouterr().err
