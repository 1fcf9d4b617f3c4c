"""The audit of data: planted duplicates and leaks are found, and the figures of the paper's own files."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dean_interp import Behaviour, Example, InputError, load_behaviour
from dean_interp.cli.main import main
from dean_interp.data.audit import audit
from dean_interp.data.leakage import near_groups, normalised, without_leaks
from dean_interp.evaluation.judges.lexical import lexical_labels

LONG = "Which of my neighbours should I ask about the parcel that was left at the wrong door on Monday morning?"


def behaviour(name: str, *prompts: str, answers: dict[str, str] | None = None) -> Behaviour:
    return Behaviour(name, tuple(Example(prompt, answers or {"response": "Yes."}) for prompt in prompts), split=None)


def refusals(answers: list[str]) -> list[bool]:
    return [one == "refusal" for one in lexical_labels(answers)]


def test_planted_duplicates_are_counted_by_kind():
    data = behaviour("a", LONG, LONG, LONG.upper() + "!!", LONG.replace("Monday", "Sunday"), "How old is the moon?")
    (found,) = audit([data], refused=refusals).sets
    assert (found.n_rows, found.n_verbatim, found.n_prompts, found.n_repeats, found.n_near) == (5, 4, 3, 2, 1)


def test_leaks_have_a_direction_and_near_ones_are_further_ones():
    first = behaviour("first", LONG, "How old is the moon?")
    second = behaviour("second", LONG.lower(), LONG.replace("Monday", "Sunday"), "What is a pawn?", "What is a pawn?")
    there, back = audit([first, second], refused=refusals).leaks
    assert (there.first, there.n_verbatim, there.n_exact, there.n_near) == ("first", 0, 1, 1)
    assert (there.n_exact_rows, there.n_rows) == (1, 2)
    assert (back.first, back.n_exact, back.n_near, back.n_rows) == ("second", 1, 0, 1)


def test_prompts_answered_both_ways_are_found_within_a_set_and_across_files():
    pair = behaviour("pair", LONG, answers={"safe": "No.", "unsafe": "Yes."})
    safe, unsafe = behaviour("x_safe_1k", LONG, "b"), behaviour("x_unsafe_1k", LONG, "c")
    found = audit([pair, safe, unsafe], refused=refusals)
    assert [one.n_both for one in found.sets] == [1, 0, 0]
    by_pair = {(leak.first, leak.second): leak.n_opposite for leak in found.leaks}
    assert by_pair["x_safe_1k", "x_unsafe_1k"] == by_pair["x_unsafe_1k", "x_safe_1k"] == 1


def test_refusals_and_marks_of_a_chat_template_are_counted():
    data = behaviour("a", "p", "<|im_start|>user q", answers={"response": "I can't help with that."})
    (found,) = audit([data], refused=refusals).sets
    assert (found.n_answers, found.n_refusals, found.n_templated, found.template) == (2, 2, 1, "ChatML")


@pytest.mark.parametrize(
    ("text", "template"),
    [
        ("<|im_start|>user\nHello", "ChatML"),
        ("[INST] Hello [/INST]", "Llama 2"),
        ("<|start_header_id|>user<|end_header_id|>", "Llama 3"),
        ("<start_of_turn>user", "Gemma"),
        ("<|user|>Hello", "Zephyr"),
        ("### Instruction:\nHello", "Alpaca"),
        ("\n\nHuman: Hello\n\nAssistant: Hi", "Human and Assistant"),
        ("The human: a history. An assistant: what is it? [INSTALL]", None),
    ],
)
def test_the_template_of_a_text_is_guessed_from_its_marks(text, template):
    (found,) = audit([behaviour("a", text, "plain")], refused=refusals).sets
    assert (found.template, found.n_templated) == (template, int(template is not None))


def test_lengths_are_quartiles_in_characters_and_in_tokens_where_there_is_a_tokenizer():
    data = behaviour("a", "a b", "a b c d", "a b c", "a", "a b c d e", answers={"response": "so it is"})
    (plain,), (counted,) = (audit([data], refused=refusals, tokenize=how).sets for how in (None, str.split))
    assert (plain.prompt_length, plain.answer_length, plain.prompt_tokens) == ((3, 5, 7), (8, 8, 8), None)
    assert (counted.prompt_tokens, counted.answer_tokens) == ((2, 3, 4), (3, 3, 3))


def test_a_set_without_answers_and_words_without_letters_are_counted():
    data = Behaviour("asked", tuple(Example(prompt, {}) for prompt in ("??", "!!", "??", "Что это?", "что это")))
    found = audit([data], refused=refusals, licences={"asked": "CC0"})
    (one,) = found.sets
    assert (one.n_prompts, one.n_repeats, one.n_answers, one.licence) == (3, 2, 0, "CC0")
    assert "CC0" in str(found) and "no prompt is in two" not in str(found)
    assert json.loads(json.dumps(dataclasses.asdict(found)))["sets"][0]["n_repeats"] == 2


words = st.lists(st.sampled_from("moon pawn river glass door parcel spoon cloud".split()), min_size=1, max_size=9)


@settings(max_examples=60)
@given(st.lists(words.map(" ".join), min_size=1, max_size=6), st.lists(words.map(" ".join), min_size=1, max_size=6))
def test_what_is_left_holds_no_calibration_prompt_and_nothing_else_is_lost(test, calibration):
    held = {normalised(prompt) for prompt in calibration}
    left = [prompt for prompt in test if normalised(prompt) not in held]
    whole = behaviour("t", *test, LONG)  # which no calibration prompt is like
    clean, leaked = without_leaks(whole, [behaviour("c", *calibration)], threshold=1.0)
    assert set(clean.prompts) <= {*left, LONG}
    assert {*clean.prompts, *leaked.exact, *leaked.near} == {*test, LONG}
    assert {normalised(prompt) for prompt in leaked.exact} == {normalised(prompt) for prompt in test} & held


places = st.lists(st.integers(0, 400), min_size=12, max_size=30, unique=True)


@settings(max_examples=40)
@given(places)
def test_a_planted_near_duplicate_is_found_and_an_unrelated_prompt_is_not(numbers):
    """One more word at the end leaves n trigrams of n + 1: a similarity of 10 in 11 or more."""
    prompt = " ".join(f"word{i}" for i in numbers)
    test = behaviour("t", f"{prompt} indeed", " ".join(f"other{i}" for i in numbers))
    clean, leaked = without_leaks(test, [behaviour("c", prompt)])
    assert (leaked.exact, leaked.near, len(clean)) == ((), (test.prompts[0],), 1)
    (leak, _) = audit([behaviour("c", prompt), test], refused=refusals).leaks
    assert (leak.n_exact, leak.n_near) == (0, 1)


def test_built_in_tests_have_no_leaks_and_stay_as_they_are():
    for name in ("fairness", "privacy", "general"):
        test = load_behaviour(name, n_examples=None, split="test")
        clean, leaked = without_leaks(test, [load_behaviour(name, n_examples=None)])
        assert clean == test and not leaked.exact and not leaked.near


def test_bad_thresholds_names_and_total_leaks_are_refused():
    one = behaviour("a", "p")
    with pytest.raises(InputError, match=r"threshold must be in \(0, 1\], got 0.0"):
        audit([one], refused=refusals, threshold=0.0)
    with pytest.raises(InputError, match="name of its own"):
        audit([one, one], refused=refusals)
    with pytest.raises(InputError, match="every test prompt of 'a'"):
        without_leaks(one, [one])


def test_the_command_prints_a_table_and_writes_json(tmp_path, capsys):
    for name, prompts in (("one", [LONG, "b"]), ("two", [LONG])):
        rows = "".join(json.dumps({"prompt": prompt, "response": "Yes."}) + "\n" for prompt in prompts)
        (tmp_path / f"{name}.jsonl").write_text(rows)
    files = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    assert main(["data", "audit", *files, "--out", str(tmp_path / "audit.json")]) == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0][:3] == ["data", "set", "rows"] and table[1][:3] == ["one", "2", "2"]
    assert ["two", "one", "1", "1", "0", "1", "1", "0"] in table
    assert json.loads((tmp_path / "audit.json").read_text())["leaks"][0]["n_exact"] == 1
    assert main(["data", "audit", str(tmp_path / "gone.csv")]) == 2
    assert "no file" in capsys.readouterr().err
    assert main(["data", "show", files[0], "--n-examples", "1"]) == 0
    assert "response: Yes." in (told := capsys.readouterr().out) and "2 rows in all" in told


def test_the_command_counts_tokens_with_a_tokenizer_that_it_can_load(tmp_path, tokenizer, capsys):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "one.csv").write_text("prompt\nabc\n")  # the tokenizer has one token a byte
    command = ["data", "audit", str(tmp_path / "one.csv"), "--tokenizer"]
    assert main([*command, str(tmp_path / "tokenizer"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["sets"]
    assert (found["prompt_tokens"], found["answer_tokens"], found["n_answers"]) == ([3, 3, 3], None, 0)
    assert main([*command, str(tmp_path / "gone")]) == 2
    assert "cannot load a tokenizer from" in capsys.readouterr().err


class TestQuestions:
    def test_a_file_of_questions_alone_can_be_asked_and_not_scored(self, tmp_path):
        path = tmp_path / "asked.csv"
        path.write_text('questions\n"What, now?"\nWho?\n')
        found = load_behaviour(path, n_examples=None, split=None)
        assert found.prompts == ["What, now?", "Who?"] and all(not one.answers for one in found.examples)
        with pytest.raises(InputError, match="can be answered, not scored"):
            found.responses  # noqa: B018

    def test_a_prompt_without_its_answer_is_a_fault_beside_others_that_have_one(self, tmp_path):
        path = tmp_path / "asked.jsonl"
        path.write_text('{"prompt": "Who?"}\n{"prompt": "You?", "response": "I."}\n')
        with pytest.raises(InputError, match="line 1: has no response"):
            load_behaviour(path, split=None)
        path.write_text('{"question": " "}\n')
        with pytest.raises(InputError, match="prompt is missing or blank"):
            load_behaviour(path, split=None)


def drawn(data: Behaviour) -> Behaviour:
    """The released code's draw of 128."""
    rows = np.random.default_rng(0).permutation(len(data))[:128]
    return Behaviour(data.name, tuple(data.examples[i] for i in rows), split=None)


def test_the_papers_files_hold_what_is_known_of_them(shared: Path):
    """The figures known of them are by lower case: between our counts as they stand and by letters and digits."""
    files = {path.stem.replace("beaver_train330k_", ""): path for path in (shared / "data").glob("*.csv")}
    data = {name: load_behaviour(path, n_examples=None, split=None) for name, path in files.items()}
    some = [data[name] for name in ("fairness_safe_1k", "fairness_unsafe_1k", "salad_fairness") if name in data]
    found = audit(some, refused=refusals)
    leaks = {(leak.first[-16:], leak.second[-16:]): leak for leak in found.leaks}
    safe, unsafe, salad = (one.name[-16:] for one in some)
    assert [leaks[one, salad].n_verbatim for one in (safe, unsafe)] == [122, 187]
    assert [leaks[one, salad].n_exact for one in (safe, unsafe)] == [124, 189]
    lower = [{prompt.lower() for prompt in one.prompts} for one in some]
    assert [len(lower[i] & lower[2]) for i in (0, 1)] == [123, 188], "the figures of released_code.md"
    assert leaks[safe, unsafe].n_opposite == 112
    assert found.sets[0].n_verbatim == 659
    assert found.sets[2].n_rows == 2165 and found.sets[2].n_answers == 0
    draws = [
        drawn(data[f"{name}_1k"]) for name in ("fairness_safe", "fairness_unsafe", "privacy_safe", "privacy_unsafe")
    ]
    asked = [{prompt.lower() for prompt in data[f"salad_{name}"].prompts} for name in ("fairness", "privacy")]
    held = [sum(prompt.lower() in asked[i // 2] for prompt in one.prompts) for i, one in enumerate(draws)]
    assert held == [27, 34, 4, 1]
    private = audit([data["privacy_safe_1k"], data["privacy_unsafe_1k"]], refused=refusals)
    assert private.sets[0].n_verbatim == 277 and private.leaks[0].n_opposite == 63
    # the rule behind the known 249 and 10 is not known: the lexical judge says 241 and 4, a plain rule 251 and 10
    assert (private.sets[0].n_refusals, found.sets[0].n_refusals) == (241, 4)
    plain = re.compile(r"sorry|\bI can(not|'t| not)", re.IGNORECASE)
    opening = [[answer[:80].replace("’", "'") for answer in data[f"{name}_safe_1k"].responses]
               for name in ("privacy", "fairness")]  # fmt: skip
    counts = [sum(bool(plain.search(text)) for text in texts) for texts in opening]
    assert abs(counts[0] - 249) <= 5 and abs(counts[1] - 10) <= 2


def test_near_duplicates_and_their_near_duplicates_are_in_one_group():
    """The second is near to the first and to the third; the first and the third need not be near each other."""
    words = "which of my neighbours should i ask about the parcel that was left at the wrong door on monday".split()
    second = [*words[:-1], "sunday"]
    third = ["whom", *second[1:]]
    prompts = ["How old is the moon?", " ".join(words), " ".join(second), "What is a pawn?", " ".join(third)]
    assert near_groups(prompts) == [0, 1, 1, 3, 1]
    assert near_groups([LONG, LONG.upper(), "How old is the moon?"]) == [0, 0, 2], "equal but for the writing"
    assert near_groups([]) == []


def test_only_a_word_of_a_name_tells_the_kind_of_its_answers():
    """`safety_rules` was taken for a set of safe answers."""
    sets = [Behaviour(name, (Example("Who?", {"response": name}),)) for name in ("safety_rules", "a_unsafe", "b_safe")]
    found = audit(sets, refused=lambda answers: [False for _ in answers])
    by_pair = {(leak.first, leak.second): leak.n_opposite for leak in found.leaks}
    assert by_pair["safety_rules", "a_unsafe"] == 0 and by_pair["a_unsafe", "b_safe"] == 1
