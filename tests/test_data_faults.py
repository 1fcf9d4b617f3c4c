"""Data says what is wrong with it: in its own words, by the true line, and no two sets or prompts pass for two."""

import gzip
import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dean_interp import Behaviour, Example, InputError, load_behaviour, measure
from dean_interp.cli.data import AuditData, DataStep, ShowData, do_data
from dean_interp.data.leakage import without_leaks
from dean_interp.data.prompt_text import is_among, normalised, prompt_hash
from dean_interp.data.sources import load_source
from dean_interp.study.settings import AnswerConfig, DataConfig
from dean_interp.study.study_data import prompt_sets, running_text

ALIKE = ["Café au lait?", "Cafe\u0301 au lait?", "café au\u00a0lait", "CAFÉ  AU LAIT? ", "ca\u00adfé\u200b au lait?"]


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(source: object) -> str:
    with pytest.raises(InputError) as caught:
        load_behaviour(source, n_examples=None, split=None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows(*prompts: str, **fields: str) -> str:
    return "".join(json.dumps({"prompt": prompt, "response": "r", **fields}) + "\n" for prompt in prompts)


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("prompt,response,topic,Topic", "has the column 'topic' twice ('topic', 'Topic')"),
        ("prompt, prompt,response,x", "has the column 'prompt' twice ('prompt', ' prompt')"),
        ("prompt,response,note,note", "has the column 'note' twice"),
        ("prompt,response,Split,x", "the column 'Split' must be written 'split'"),
        (
            "prompt;safe;unsafe;topic",
            "semicolons separate the columns, where commas must: got 'prompt;safe;unsafe;topic'",
        ),
        ("prompt\tsafe\tunsafe", "tabs separate the columns, where commas must: got 'prompt\\tsafe\\tunsafe'"),
        ("prompt,safe,unsave,topic", "has safe without unsafe: 'unsave' (did you mean 'unsafe'?)"),
        ("prompt,unsafe,sfae,topic", "has unsafe without safe: 'sfae' (did you mean 'safe'?)"),
        ("promt,safe,unsafe,topic", "needs the columns "),
    ],
)
def test_a_column_that_is_there_twice_or_nearly_named_is_refused_by_name(tmp_path, header, said):
    assert f"m.csv: line 1: {said}" in error_of(put(tmp_path / "m.csv", f"{header}\na,b,c,d\n"))


def test_a_misspelt_answer_of_a_json_row_is_told_its_name(tmp_path):
    path = put(tmp_path / "m.jsonl", '{"prompt": "a", "safe": "b", "unsave": "c"}\n')
    assert error_of(path).endswith("m.jsonl: line 1: has safe without unsafe: 'unsave' (did you mean 'unsafe'?)")


@pytest.mark.parametrize(
    ("name", "content", "unused"),
    [
        ("m.csv", "question,good,bad,topic\nWho?,a,b,law\n", ["good", "bad"]),
        ("m.csv", "prompt,response,topic,source,\nWho?,a,law,x,\n", ["source"]),
        ("m.jsonl", '{"prompt": "Who?", "response": "a", "topic": "law", "note": "x"}\n', ["note"]),
        ("m.csv", "prompt,response,topic\nWho?,a,law\n", []),
    ],
)
def test_showing_data_shows_topics_and_names_the_columns_that_are_not_used(tmp_path, name, content, unused):
    result = do_data(DataStep(ShowData(str(put(tmp_path / name, content)))))
    assert result.record.get("unused_columns", []) == unused
    assert "  topic: law\n" in result.text and "1 rows in all" in result.text
    named = f"no use is made of the columns {', '.join(map(repr, unused))}"
    assert result.text.endswith(named) if unused else "no use" not in result.text


def test_columns_without_a_name_may_be_several(tmp_path):
    assert len(load_behaviour(put(tmp_path / "m.csv", "prompt,response,,\na,b,,\n"), n_examples=1, split=None)) == 1


def test_a_json_key_that_is_there_twice_is_a_bad_row(tmp_path):
    path = put(tmp_path / "m.jsonl", rows("a") + '{"prompt": "b", "response": "c", "split": "test", "split": ""}\n')
    assert error_of(path).endswith("m.jsonl: line 2: has 'split' twice")
    published = put(tmp_path / "alpaca.json", '[{"instruction": "a", "instruction": "b", "input": "", "output": "c"}]')
    with pytest.raises(InputError, match=r"alpaca\.json: has 'instruction' twice"):
        load_source("alpaca", "general", published)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_bad_byte_is_named_by_its_true_line_after_quoted_lines_and_any_line_end(tmp_path, end):
    text = end.join(["prompt,response", '"two', 'lines",a', *["x,y"] * 3000])
    path = put(tmp_path / "m.csv", text.encode() + end.encode() + b"na\xefve,z" + end.encode())
    assert error_of(path).endswith("m.csv: line 3004: the byte 0xef is not UTF-8: save the file as UTF-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompt,response\na,b\n".encode("utf-16"), "line 1: this is UTF-16"),
        ("prompt,response\na,b\n".encode("utf-16-be"), "line 1: holds a NUL"),
        (b"prompt,response\na,b\nc\0,d\n", "line 3: holds a NUL"),
        (gzip.compress(b"prompt,response\na,b\n", mtime=0), "line 1: this is gzip"),
        (b"PK\x03\x04", "line 1: this is a zip archive or a spreadsheet"),
    ],
)
def test_a_file_that_is_no_text_says_what_it_is(tmp_path, content, said):
    assert f"m.csv: {said}" in error_of(put(tmp_path / "m.csv", content))


def test_running_text_that_is_not_utf8_is_refused_by_its_line(tmp_path):
    with pytest.raises(InputError, match="line 2: the byte 0xfc is not UTF-8"):
        running_text(str(put(tmp_path / "text.TXT", b"one\ntw\xfc\n")))


def test_a_json_array_over_several_lines_is_told_from_json_lines(tmp_path):
    assert "line 1: a JSON array begins" in error_of(put(tmp_path / "m.jsonl", '[\n{"prompt": "a"}\n]\n'))


@pytest.mark.parametrize("name", ["m.json", "m.TSV", "m.xlsx", "m.csv.gz", "m"])
def test_a_file_that_is_there_and_of_a_kind_that_is_not_read_is_never_looked_for_on_the_hub(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    put(tmp_path / "data" / name, "x")
    assert error_of(f"data/{name}").startswith(f"the file data/{name} is there, but only .csv and .jsonl files")


def test_a_missing_file_of_another_kind_and_a_folder_with_a_files_name_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert error_of("data/gone.parquet").startswith("no file data/gone.parquet; and")
    (tmp_path / "folder.csv").mkdir()
    assert error_of("folder.csv") == "folder.csv is a folder, not a file"


@pytest.mark.usefixtures("untyped")
def test_a_table_says_how_it_becomes_a_data_set():
    frame = pd.DataFrame({"prompt": ["a", "b"], "response": ["c", None]})
    assert "got DataFrame (datasets.Dataset.from_pandas" in error_of(frame)
    assert error_of(datasets.Dataset.from_pandas(frame)) == "dataset: row 2: has no response (nor safe and unsafe)"


def test_data_sets_in_memory_are_told_apart_by_the_names_that_they_are_given(llama):
    made = datasets.Dataset.from_list([{"prompt": "Who?", "response": "I."}])
    first, second = (load_behaviour(made, n_examples=None, split=None, name=name) for name in ("mine", "yours"))
    assert list(measure(llama, [first, second]).behaviours) == ["mine", "yours"]
    unnamed = load_behaviour(made, n_examples=None, split=None)
    with pytest.raises(InputError, match=r"a name of its own \(load_behaviour\(..., name=...\)\), got"):
        measure(llama, [unnamed, unnamed])


def test_two_files_of_one_name_or_one_file_under_two_names_are_refused(tmp_path):
    first, second = (str(put(tmp_path / folder / "data.csv", "prompt,response\na,b\n")) for folder in "ab")
    (tmp_path / "link.csv").symlink_to(first)
    with pytest.raises(InputError, match=f"different behaviours: {first} and {second} would both be called 'data'"):
        DataConfig(first=first, second=second).check()
    with pytest.raises(InputError, match="are one file"):
        DataConfig(first=first, second=str(tmp_path / "link.csv")).check()
    with pytest.raises(InputError, match="'FAIRNESS': rename one"):
        DataConfig(second="x/FAIRNESS.csv").check()
    with pytest.raises(InputError, match="would both be called 'data'"):
        do_data(DataStep(AuditData((first, second))))
    for answers in (AnswerConfig(harmful=(first, second)), AnswerConfig(over_refusal=(first, "other/privacy.jsonl"))):
        with pytest.raises(InputError, match="each set of prompts needs a name of its own"):
            prompt_sets(DataConfig(), answers, scored=frozenset())


@pytest.mark.parametrize("other", ALIKE[1:])
def test_one_function_knows_a_prompt_by_its_letters_wherever_prompts_are_compared(other):
    scored = Behaviour("scored", (Example(ALIKE[0], {"response": "r"}),))
    test = Behaviour("test", (Example(other, {"response": "r"}), Example("Another one?", {"response": "r"})))
    assert prompt_hash(other) in scored.prompt_hashes and is_among(other, scored.prompt_hashes)
    assert without_leaks(test, [scored])[0].prompts == ["Another one?"]


def test_letters_that_differ_are_other_prompts_in_every_script():
    assert len({normalised(text) for text in ("कि", "का", "की", "ไก่", "ไข่", "resume", "résumé")}) == 7
    assert normalised("?!\u200b ") == normalised("?!") == "?!"
    assert (
        len({normalised(text) for text in ("3 + 4", "3 - 4", "3 * 4", "3 / 4", "3 4", "C++", "C#", "C", "-4", "4")})
        == 10
    )
    assert normalised("3+4?") == normalised("3 + 4") == normalised("3 \uff0b 4")
    assert normalised("3-4") == normalised("3 \u2212 4") != normalised("Covid-19") == normalised("covid 19")


@given(st.text())
def test_a_normal_form_is_its_own_and_no_blank_or_case_changes_it(text):
    assert normalised(normalised(text)) == normalised(text) == normalised(f"\u00a0{text}\u200b ")


def test_prompts_that_are_one_are_in_one_half_whatever_their_order(tmp_path):
    several = [f"Prompt {i}{end}" for i in range(40) for end in ("?", " ?", "!")]
    halves = []
    for order in (several, several[::-1]):
        path = put(tmp_path / "m.jsonl", rows(*order))
        parts = [load_behaviour(path, n_examples=None, split=split) for split in ("calibration", "test")]
        assert not parts[0].prompt_hashes & parts[1].prompt_hashes
        halves.append(parts[0].prompt_hashes)
    assert halves[0] == halves[1]


def test_a_file_that_has_a_prompt_in_both_splits_but_for_a_blank_is_refused(tmp_path):
    path = put(tmp_path / "m.jsonl", rows("Who?", split="calibration") + rows("who ?", split="test"))
    assert error_of(path).endswith("line 2: the prompt is in both splits")
    # a row without a split goes where its twin is
    for split in ("calibration", "test"):
        mixed = put(tmp_path / "n.jsonl", rows("Who?", split=split) + rows("Who? "))
        assert len(load_behaviour(mixed, n_examples=None, split=split)) == 2
