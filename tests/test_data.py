"""Reading, splitting and drawing examples: what `load_behaviour` promises, and what it says when a file is wrong."""

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dean_interp.data.examples import Behaviour, load_behaviour
from dean_interp.data.readers import unused_columns
from dean_interp.errors import InputError

PAIR = {"prompt": "Who left the note?", "safe": "That is for them to say.", "unsafe": "Read it and see."}


def csv_file(folder: Path, text: str, name: str = "mine.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())  # bytes: line ends stay as written
    return path


def jsonl_file(folder: Path, *rows: object, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def numbered(folder: Path, n_rows: int, **fields: str) -> Path:
    return jsonl_file(folder, *({"prompt": f"prompt {i}", "response": f"answer {i}", **fields} for i in range(n_rows)))


def whole(source: "Path | str | datasets.Dataset") -> Behaviour:
    return load_behaviour(source, n_examples=None, split=None)


def error_of(source: "Path | str | datasets.Dataset", **options: object) -> str:
    with pytest.raises(InputError) as caught:
        load_behaviour(source, **{"n_examples": None, "split": None, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def paper_data() -> Path:
    shared = Path(os.environ.get("DEAN_INTERP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (shared / "data").is_dir():
        pytest.skip(f"the paper's data are not in {shared / 'data'} (set DEAN_INTERP_SHARED)")
    return shared / "data"


# The draw


def test_the_draw_of_a_thousand_rows_with_seed_0_starts_at_459_206_222_162_711(tmp_path):
    drawn = load_behaviour(numbered(tmp_path, 1000), n_examples=5, seed=0, split=None)
    assert drawn.prompts == [f"prompt {i}" for i in (459, 206, 222, 162, 711)]
    assert drawn.responses == [f"answer {i}" for i in (459, 206, 222, 162, 711)]


@pytest.mark.parametrize(("n_rows", "n_examples", "seed"), [(7, 7, 0), (40, 3, 1), (1000, 128, 2), (1, 1, 0)])
def test_the_draw_is_the_documented_permutation(tmp_path, n_rows, n_examples, seed):
    drawn = load_behaviour(numbered(tmp_path, n_rows), n_examples=n_examples, seed=seed, split=None)
    assert drawn.prompts == [f"prompt {i}" for i in np.random.default_rng(seed).permutation(n_rows)[:n_examples]]


def test_rows_are_split_before_they_are_drawn(tmp_path):
    path = numbered(tmp_path, 200)
    half = load_behaviour(path, n_examples=None).prompts
    drawn = load_behaviour(path, n_examples=20, seed=3).prompts
    assert drawn == [half[i] for i in np.random.default_rng(3).permutation(len(half))[:20]]


def test_a_larger_draw_begins_with_the_smaller_one(tmp_path):
    path = numbered(tmp_path, 50)
    small, large = (load_behaviour(path, n_examples=n, split=None).prompts for n in (8, 30))
    assert large[:8] == small
    assert len(set(large)) == 30


def test_no_number_takes_all_of_it_in_file_order(tmp_path):
    assert whole(numbered(tmp_path, 30)).prompts == [f"prompt {i}" for i in range(30)]


def test_the_draw_on_the_papers_file_picks_its_rows_by_number(paper_data):
    path = paper_data / "beaver_train330k_fairness_safe_1k.csv"
    rows = whole(path)
    drawn = load_behaviour(path, n_examples=128, seed=0, split=None)
    assert len(rows) == 1000
    assert drawn.prompts[:5] == [rows.prompts[i] for i in (459, 206, 222, 162, 711)]
    assert drawn.responses[:5] == [rows.responses[i] for i in (459, 206, 222, 162, 711)]


def test_the_papers_question_lists_are_prompts_without_answers(paper_data):
    read = load_behaviour(paper_data / "salad_privacy.csv", n_examples=None, split=None)
    assert len(read) == 657 and not any(example.answers for example in read.examples)


# CSV


def test_a_csv_with_one_answer_a_prompt(tmp_path):
    read = whole(csv_file(tmp_path, 'prompt,response\nOne?,"Yes, one"\nTwo?,"He said ""two"""\n'))
    assert (read.name, read.prompts, read.responses) == ("mine", ["One?", "Two?"], ["Yes, one", 'He said "two"'])
    assert not read.paired


def test_a_csv_with_pairs_keeps_topics_and_splits(tmp_path):
    path = csv_file(tmp_path, "topic,prompt,safe,unsafe,split\nt1,One?,s1,u1,test\nt2,Two?,s2,u2,calibration\n")
    assert whole(path).paired
    (test,) = load_behaviour(path, n_examples=None, split="test").examples
    assert (test.prompt, test.topic, dict(test.answers)) == ("One?", "t1", {"safe": "s1", "unsafe": "u1"})


def test_a_blank_topic_is_none_and_blanks_around_one_make_no_other(tmp_path):
    """Rows with a blank cell were one cluster, and `rent ` was another topic than `rent`."""
    text = "prompt,response,topic\na,1,rent\nb,2,rent \nc,3, \nd,4,\n"
    examples = load_behaviour(csv_file(tmp_path, text), n_examples=None, split=None).examples
    assert [example.topic for example in examples] == ["rent", "rent", None, None]
    assert [example.cluster for example in examples] == ["rent", "rent", "c", "d"]


def test_quoted_fields_may_span_lines_and_later_rows_keep_their_line_numbers(tmp_path):
    text = 'prompt,response\n"first\nsecond\nthird",a\nfine,"b\nc"\n,bad\n'
    assert error_of(csv_file(tmp_path, text)).endswith("mine.csv: line 7: prompt is missing or blank")
    read = whole(csv_file(tmp_path, text.removesuffix(",bad\n")))
    assert read.prompts == ["first\nsecond\nthird", "fine"]
    assert read.responses == ["a", "b\nc"]


def test_windows_line_ends_change_neither_rows_nor_line_numbers(tmp_path):
    text = 'prompt,response\r\n"a\r\nb",c\r\n,d\r\n'
    assert error_of(csv_file(tmp_path, text)).endswith("line 4: prompt is missing or blank")
    assert whole(csv_file(tmp_path, text.removesuffix(",d\r\n"))).prompts == ["a\r\nb"]


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_byte_order_mark_is_not_part_of_the_first_field(tmp_path, suffix):
    text = {"csv": "prompt,response\nÜber?,ja\n", "jsonl": '{"prompt": "Über?", "response": "ja"}\n'}[suffix]
    path = tmp_path / f"bom.{suffix}"
    path.write_text(text, encoding="utf-8-sig")
    assert whole(path).prompts == ["Über?"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: needs the columns prompt,response (or prompt,safe,unsafe; or prompt alone; or question), got []"),
        ("question,response\na,b\n", "line 1: needs the columns .*got ['question', 'response']"),
        ("prompt,answer\na,b\n", "line 1: needs the columns .*got ['prompt', 'answer']"),
        ("prompt,safe_answer,topic\na,b,c\n", "line 1: needs the columns .*got ['prompt', 'safe_answer', 'topic']"),
        ("topic,split\na,test\n", "line 1: needs the columns .*got ['topic', 'split']"),
        ("prompt,response\na\nb\n", "line 2: has no response (nor safe and unsafe); line 3: has no response"),
        ("prompt,response\na,b\nc,d,e\n", "line 3: has more fields than columns"),
        ("prompt,response\na,b\nc\n", "line 3: has no response (nor safe and unsafe)"),
        ("prompt,response\na,b\n , c\n", "line 3: prompt is missing or blank"),
        ("prompt,response\na,b\nc, \n", "line 3: response is blank"),
        ("prompt,safe,unsafe\na,b,c\nd,e,\n", "line 3: unsafe is blank"),
        ("prompt,safe,unsafe\na,b,c\nd,,e\n", "line 3: safe is blank"),
        ("prompt,response,split\na,b,test\nc,d,train\n", "line 3: split must be 'calibration' or 'test', got 'train'"),
        ('prompt,response\na,b\n"c,d\n', "line 3: unexpected end of data"),
        ('prompt,response\na,b\n"c"d,e\n', "line 3: ',' expected after '\"'"),
    ],
)
def test_a_bad_csv_is_reported_by_file_and_line(tmp_path, text, said):
    path = csv_file(tmp_path, text)
    found = error_of(path)
    assert found.startswith(f"{path}: ")
    assert all(part in found for part in said.split(".*"))


def test_prompts_alone_are_only_answered_in_every_kind_of_source(tmp_path):
    rows = [{"prompt": "One?", "topic": "t", "split": "test"}, {"prompt": "Two?", "topic": "u", "split": "test"}]
    sources = [
        csv_file(tmp_path, "prompt,topic,split\nOne?,t,test\nTwo?,u,test\n"),
        csv_file(tmp_path, "topic,questions,split,source\nt,One?,test,x\nu,Two?,test,y\n", "mine2.csv"),
        jsonl_file(tmp_path, *rows),
        datasets.Dataset.from_list(rows),
    ]
    for source in sources:
        read = load_behaviour(source, n_examples=None, split="test")
        assert [(one.prompt, one.topic, dict(one.answers)) for one in read.examples] == [
            ("One?", "t", {}),
            ("Two?", "u", {}),
        ]
        with pytest.raises(InputError, match="it can be answered, not scored or measured"):
            read.responses  # noqa: B018


@pytest.mark.parametrize("field", ["answer", "Response", "reponse"])
def test_prompts_beside_an_unknown_field_may_have_lost_their_answers(tmp_path, field):
    said = "line 1: has no response (nor safe and unsafe)"
    assert said in error_of(jsonl_file(tmp_path, {"prompt": "One?", field: "Yes."}, {"prompt": "Two?"}))


# JSONL


def test_jsonl_rows_carry_answers_topic_and_split(tmp_path):
    path = jsonl_file(
        tmp_path,
        {**PAIR, "topic": "notes", "split": "test", "source": "other fields are left alone"},
        "",
        {"prompt": "Two?", "response": "Yes", "topic": None, "split": "calibration"},
    )
    first, second = whole(path).examples
    assert (first.topic, dict(first.answers)) == ("notes", {k: PAIR[k] for k in ("safe", "unsafe")})
    assert (second.topic, dict(second.answers)) == (None, {"response": "Yes"})
    assert load_behaviour(path, n_examples=1, split="calibration").prompts == ["Two?"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{'prompt': 'a'}", "is not JSON (Expecting property name enclosed in double quotes)"),
        ('{"prompt": "a", "response"', "is not JSON (Expecting ':' delimiter)"),
        (["prompt", "response"], "is not an object with a prompt, got list"),
        ("null", "is not an object with a prompt, got NoneType"),
        ({"response": "b"}, "prompt is missing or blank"),
        ({"prompt": None, "response": "b"}, "prompt is missing or blank"),
        ({"prompt": " \n", "response": "b"}, "prompt is missing or blank"),
        ({"prompt": 7, "response": "b"}, "prompt must be text, got int"),
        ({"prompt": "a"}, "has no response (nor safe and unsafe)"),
        ({"prompt": "a", "response": None}, "has no response (nor safe and unsafe)"),
        ({"prompt": "a", "response": " "}, "response is blank"),
        ({"prompt": "a", "response": ["b"]}, "response must be text, got list"),
        ({**PAIR, "unsafe": ""}, "unsafe is blank"),
        ({**PAIR, "safe": {}}, "safe must be text, got dict"),
        ({**PAIR, "topic": 3}, "topic must be text, got int"),
        ({**PAIR, "split": 1}, "split must be text, got int"),
        ({**PAIR, "split": "dev"}, "split must be 'calibration' or 'test', got 'dev'"),
    ],
)
def test_a_bad_jsonl_row_is_reported_by_file_and_line(tmp_path, row, said):
    path = jsonl_file(tmp_path, PAIR, "", row, PAIR)  # blank lines are skipped and counted
    assert error_of(path) == f"{path}: line 3: {said}"


def test_several_bad_rows_come_in_one_error(tmp_path):
    path = jsonl_file(tmp_path, {"prompt": "a"}, PAIR, "oops", {"prompt": "", "response": "b"})
    assert error_of(path) == (
        f"{path}: line 1: has no response (nor safe and unsafe); "
        "line 3: is not JSON (Expecting value); line 4: prompt is missing or blank"
    )


def test_many_bad_rows_are_counted_not_listed(tmp_path):
    path = csv_file(tmp_path, "prompt,response\n" + ",x\n" * 40)
    said = error_of(path)
    assert said.count("prompt is missing or blank") == 5
    assert said.endswith("line 6: prompt is missing or blank (and 35 more)")


def test_bad_rows_are_an_error_even_where_they_would_not_be_drawn(tmp_path):
    path = jsonl_file(tmp_path, {**PAIR, "split": "calibration"}, {"prompt": "a", "split": "test"})
    assert "line 2" in error_of(path, n_examples=1, split="calibration")


# Hugging Face datasets


def rows_in_memory(n_rows: int = 6) -> datasets.Dataset:
    return datasets.Dataset.from_list([{**PAIR, "prompt": f"p{i}", "topic": f"t{i % 2}"} for i in range(n_rows)])


def test_a_dataset_in_memory_is_read_row_by_row():
    read = whole(rows_in_memory())
    assert read.prompts == [f"p{i}" for i in range(6)]
    assert [example.topic for example in read.examples] == ["t0", "t1"] * 3
    assert read.name == "dataset"
    assert read.paired


def test_a_bad_row_of_a_dataset_is_reported_by_its_number():
    rows = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}, {"prompt": "c", "response": None}])
    assert error_of(rows) == "dataset: row 2: has no response (nor safe and unsafe)"


def test_a_saved_folder_is_named_by_its_folder_and_equals_the_dataset(tmp_path):
    rows_in_memory().save_to_disk(tmp_path / "kindness")
    read = whole(tmp_path / "kindness")
    assert read.name == "kindness"
    assert read.examples == whole(rows_in_memory()).examples
    assert whole(str(tmp_path / "kindness")) == read


def test_a_saved_folder_of_several_splits_asks_for_one_of_them(tmp_path):
    datasets.DatasetDict(train=rows_in_memory()).save_to_disk(tmp_path / "both")
    assert error_of(tmp_path / "both").endswith("holds several splits (train): give one of them as a Dataset")


def test_a_folder_that_is_no_dataset_is_named(tmp_path):
    assert error_of(tmp_path).startswith(f"cannot load the data set '{tmp_path}': ")


def test_a_name_with_one_slash_is_fetched_from_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or rows_in_memory())
    assert whole("owner/kindness").name == "kindness"
    assert asked == [(("owner/kindness",), {"split": "train"})]


def test_a_hub_failure_is_one_line_that_names_the_data_set(monkeypatch):
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route\nand a long traceback")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert error_of("owner/kindness") == "cannot load the data set 'owner/kindness': no route"


# Which source, which split, which answer


def test_a_missing_file_is_named(tmp_path):
    for name in ("gone.csv", "gone.jsonl"):
        assert error_of(tmp_path / name) == f"no file {tmp_path / name}"


def test_an_unknown_name_lists_what_may_be_given():
    said = error_of("fairnes")
    names = "fairness, privacy, general, over_refusal_fairness, over_refusal_privacy, register"
    assert said.startswith(f"no behaviour 'fairnes' (did you mean 'fairness'?): give {names}, a .csv or .jsonl file")


def test_a_file_without_rows_has_no_examples(tmp_path):
    assert error_of(jsonl_file(tmp_path)) == "mine has no examples"
    assert error_of(csv_file(tmp_path, "prompt,response\n")) == "mine has no examples"
    only_test = jsonl_file(tmp_path, {**PAIR, "split": "test"})
    assert error_of(only_test, split="calibration") == "mine (calibration split) has no examples"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "train"}, "split must be 'calibration', 'test' or None, got 'train'"),
        ({"response": "both"}, "response must be 'safe' or 'unsafe', got 'both'"),
        ({"n_examples": 0}, "n_examples must be at least 1, got 0"),
        ({"n_examples": -3}, "n_examples must be at least 1, got -3"),
    ],
)
def test_a_bad_option_says_what_is_allowed(options, said):
    unchecked = getattr(load_behaviour, "__wrapped__", load_behaviour)  # users have no type checker in the way
    with pytest.raises(InputError) as caught:
        unchecked("fairness", **options)
    assert str(caught.value) == said


def test_asking_for_more_than_there_is_says_how_many_there_are(tmp_path):
    path = jsonl_file(
        tmp_path, *({**PAIR, "prompt": f"p{i}", "split": "test"} for i in range(3)), {**PAIR, "split": "calibration"}
    )
    assert error_of(path, n_examples=5) == "n_examples=5 but mine has 4 examples"
    assert error_of(path, n_examples=4, split="test") == "n_examples=4 but mine (test split) has 3 examples"
    assert len(load_behaviour(path, n_examples=3, split="test")) == 3


def test_a_split_column_decides_and_no_split_takes_the_whole_file(tmp_path):
    sides = ["test", "calibration", "test", "test"]
    path = jsonl_file(tmp_path, *({**PAIR, "prompt": f"p{i}", "split": side} for i, side in enumerate(sides)))
    assert load_behaviour(path, n_examples=None, split="calibration").prompts == ["p1"]
    assert load_behaviour(path, n_examples=None, split="test").prompts == ["p0", "p2", "p3"]
    assert whole(path).prompts == ["p0", "p1", "p2", "p3"]


ANCHORS = ["anchor 0", "anchor 3"]  # one in each half, so that neither is empty
PROMPTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(str.strip)


@settings(max_examples=60)
@given(prompts=st.lists(PROMPTS, max_size=12), repeats=st.integers(1, 3))
def test_without_a_split_column_no_prompt_is_in_both_halves_even_when_repeated(tmp_path_factory, prompts, repeats):
    rows = ({"prompt": prompt, "response": "r"} for prompt in ANCHORS + prompts * repeats)
    path = jsonl_file(tmp_path_factory.mktemp("halves"), *rows)
    calibration, test = (load_behaviour(path, n_examples=None, split=s).prompts for s in ("calibration", "test"))
    assert not set(calibration) & set(test)
    assert sorted(calibration + test) == sorted(ANCHORS + prompts * repeats)


def test_without_a_split_column_the_halves_are_nearly_equal_and_do_not_depend_on_order(tmp_path):
    forward = [{"prompt": f"prompt {i}", "response": "r"} for i in range(1000)]
    halves = [
        load_behaviour(jsonl_file(tmp_path, *rows), n_examples=None).prompt_hashes for rows in (forward, forward[::-1])
    ]
    assert halves[0] == halves[1]
    assert 450 < len(halves[0]) < 550


def test_the_unsafe_response_is_the_other_answer_to_the_same_prompts():
    safe, unsafe = (load_behaviour("privacy", n_examples=20, response=kind) for kind in ("safe", "unsafe"))
    assert safe.examples == unsafe.examples
    assert safe.responses == [example.answers["safe"] for example in safe.examples]
    assert unsafe.responses == [example.answers["unsafe"] for example in safe.examples]


def test_an_unpaired_file_has_no_choice_of_answer(tmp_path):
    path = numbered(tmp_path, 4)
    safe, unsafe = (load_behaviour(path, n_examples=None, split=None, response=kind) for kind in ("safe", "unsafe"))
    assert not safe.paired
    assert safe.responses == unsafe.responses == [f"answer {i}" for i in range(4)]


def test_half_a_pair_is_a_bad_row(tmp_path):
    path = jsonl_file(tmp_path, {"prompt": "Only one side?", "safe": "Yes"})
    assert "line 1: has safe without unsafe" in error_of(path)


def test_a_prompt_in_both_splits_is_a_bad_row(tmp_path):
    path = jsonl_file(tmp_path, {**PAIR, "split": "test"}, {**PAIR, "split": "calibration"})
    assert "line 2: the prompt is in both splits" in error_of(path)


# Fingerprints


def test_a_fingerprint_changes_with_any_content_and_with_nothing_else(tmp_path):
    rows = [{**PAIR, "prompt": f"p{i}"} for i in range(3)]
    before = whole(jsonl_file(tmp_path, *rows)).fingerprint
    assert whole(jsonl_file(tmp_path, *rows)).fingerprint == before
    changed = {
        whole(jsonl_file(tmp_path, *rows[::-1])).fingerprint,
        whole(jsonl_file(tmp_path, *rows[:2])).fingerprint,
        whole(jsonl_file(tmp_path, *rows, name="other.jsonl")).fingerprint,
        load_behaviour(tmp_path / "other.jsonl", n_examples=None, split=None, response="unsafe").fingerprint,
        *(
            whole(jsonl_file(tmp_path, {**rows[0], field: "new"}, *rows[1:])).fingerprint
            for field in ("prompt", "safe", "unsafe")
        ),
    }
    assert len(changed) == 7
    assert before not in changed


def test_the_same_rows_have_the_same_fingerprint_in_csv_and_jsonl(tmp_path):
    from_csv = whole(csv_file(tmp_path, "prompt,safe,unsafe\na,b,c\nd,e,f\n"))
    rows = ({"unsafe": "c", "safe": "b", "prompt": "a"}, {"prompt": "d", "safe": "e", "unsafe": "f"})
    assert whole(jsonl_file(tmp_path, *rows)).fingerprint == from_csv.fingerprint


def test_prompt_hashes_ignore_answers_and_order(tmp_path):
    first = whole(jsonl_file(tmp_path, {"prompt": "a", "response": "x"}, {"prompt": "b", "response": "y"}))
    second = whole(jsonl_file(tmp_path, {"prompt": "b", "response": "z"}, {"prompt": "a", "response": "z"}))
    assert first.prompt_hashes == second.prompt_hashes
    assert len(first.prompt_hashes) == 2


# Known gaps: each is a claim the reader does not keep yet; strict, so that a fix removes the mark.


@pytest.mark.parametrize("row", ['"hello"', '""'])
def test_a_bare_json_string_is_a_bad_row_like_any_other(tmp_path, row):
    path = jsonl_file(tmp_path, row)
    assert error_of(path) == f"{path}: line 1: is not an object with a prompt, got str"


def test_blank_lines_of_a_csv_are_skipped_and_counted(tmp_path):
    assert "line 4: prompt is missing" in error_of(csv_file(tmp_path, "prompt,response\n\n\n,b\n"))


def test_blank_lines_before_the_header_of_a_csv_are_skipped_and_counted(tmp_path):
    assert "line 4: prompt is missing" in error_of(csv_file(tmp_path, "\r\n\nprompt,response\n,b\n"))
    path = csv_file(tmp_path, "\nprompt,response,note\na,b,c\n")
    assert load_behaviour(path, n_examples=None, split=None).prompts == ["a"]
    assert unused_columns(path) == ["note"]
    assert unused_columns(csv_file(tmp_path, "\n")) == []


def test_a_malformed_csv_header_is_reported_by_file_and_line(tmp_path):
    assert "mine.csv: line 1: " in error_of(csv_file(tmp_path, '"prompt"x,response\na,b\n'))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_that_is_not_utf8_is_named(tmp_path, suffix):
    path = tmp_path / f"latin.{suffix}"
    path.write_bytes("prompt,response\ncafé,b\n".encode("latin-1"))
    assert str(path) in error_of(path)


def test_half_an_emoji_is_a_bad_row_not_a_crash(tmp_path):
    assert "line 1" in error_of(jsonl_file(tmp_path, r'{"prompt": "\ud83d", "response": "b"}'), split="test")


def test_a_dataset_dict_in_memory_asks_for_one_of_its_splits():
    assert "several splits" in error_of(datasets.DatasetDict(train=rows_in_memory()))
