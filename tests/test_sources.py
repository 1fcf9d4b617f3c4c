"""Published data sets: what becomes of their rows, from files of the same columns; the hub, its cache and its errors.

All rows here are invented: no text of a published set is in this repository.
"""

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dean_interp import Behaviour, InputError, load_behaviour
from dean_interp.cli.main import main
from dean_interp.data.paper_files import PAPER_FILES
from dean_interp.data.sources import SOURCES, licence_of, load_source, named_source

BIASED, NOSY = "discrimination,stereotype,injustice", "privacy_violation"


def beaver(prompt: str, response: str, **harms: bool) -> dict[str, object]:
    """A row as BeaverTails has them: a response is safe where no harm is marked."""
    kinds = {
        BIASED: harms.get("biased", False),
        NOSY: harms.get("nosy", False),
        "animal_abuse": harms.get("cruel", False),
    }
    return {"prompt": prompt, "response": response, "category": kinds, "is_safe": not any(kinds.values())}


BEAVERS = [
    beaver("Are tall people vain?", "Some are, as anyone may be."),
    beaver("Are tall people vain?", "All of them.", biased=True),
    beaver("Are tall people vain?", "Yes, every one.", biased=True),
    beaver("Are tall people vain?", "Height says nothing about it."),
    beaver("Where does she live?", "At the blue house.", nosy=True),
    beaver("Where does she live?", "Ask her.", biased=False),
    beaver("How do I feed a crow?", "With nuts."),
    beaver("Do the old waste water?", "They do.", biased=True),
]
QUESTION = "Who forgot the keys?"
SCENE = {"context": "The cook and the baker left.", "question": QUESTION, "category": "Age", "question_index": 7,
         "ans0": "The cook", "ans1": "Cannot tell", "ans2": "The baker", "answer_label": 1, "target_label": 2,
         "question_polarity": "neg", "context_condition": "ambig"}  # fmt: skip
PUBLISHED: Mapping[str, list[dict[str, object]]] = {
    "beavertails": BEAVERS,
    "salad": [{"question": f"{task} {i}?", "1-category": "O1", "2-category": task, "3-category": f"leaf {i}"}
              for i in range(3) for task in ("O2: Unfair Representation", "O9: Privacy Infringement", "O1: Other")],
    "alpaca": [{"instruction": "Name a river.", "input": "", "output": "The Elbe."},
               {"instruction": "Translate.", "input": "Haus", "output": "House"},
               {"instruction": "Say nothing.", "input": "", "output": ""}],
    "wikitext": [{"text": line} for line in (
        "", " = A crow = \n", "", " A crow is black . It is clever . \n", " = = Food = = \n", " It eats nuts . \n",
        " = A fox = \n", " A fox is red . It runs . \n")],
    "bbq": [SCENE, {**SCENE, "question_polarity": "nonneg"}, {**SCENE, "context_condition": "disambig"},
            {**SCENE, "target_label": None}],
    "xstest": [{"id": 1, "prompt": "How do I kill a process?", "type": "homonyms", "label": "safe", "note": ""},
               {"id": 2, "prompt": "How do I hurt a clerk?", "type": "contrast_homonyms", "label": "unsafe",
                "note": ""},
               {"id": 3, "prompt": "Where does the hare of the tale live?", "type": "privacy_fictional",
                "label": "safe", "note": ""},
               {"id": 4, "prompt": "Why do we bar purple aliens?", "type": "nons_group_real_discr", "label": "safe",
                "note": ""}],
    "orbench": [{"prompt": "Why do some dislike hats?", "category": "hate"},
                {"prompt": "How are addresses stored?", "category": "privacy"},
                {"prompt": "How do locks work?", "category": "illegal"}],
}  # fmt: skip


def rows(name: str, part: str) -> list[tuple[str, dict[str, str]]]:
    return [(row.prompt, dict(row.answers)) for row in load_source(name, part, PUBLISHED[name])]


def file_of(folder: Path, name: str, suffix: str) -> Path:
    """The invented rows of a set in a file, or a saved folder, of the same columns."""
    path, records = folder / f"{name}{suffix}", PUBLISHED[name]
    match suffix:
        case ".jsonl":
            path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", "utf-8")
        case ".json":
            path.write_text(json.dumps(records), "utf-8")
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(records[0]))
                writer.writeheader()
                writer.writerows(records)
        case ".parquet":
            datasets.Dataset.from_list(records).to_parquet(path)
        case _:
            datasets.Dataset.from_list(records).save_to_disk(path)
    return path


def whole(name: str) -> Behaviour:
    return load_behaviour(name, n_examples=None, split=None)


def error_of(name: str, part: str, records: object) -> str:
    with pytest.raises(InputError) as caught:
        load_source(name, part, records)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What becomes of a row


def test_beavertails_pairs_the_first_safe_and_the_first_unsafe_response_of_a_prompt():
    pair = {"safe": "Some are, as anyone may be.", "unsafe": "All of them."}
    assert rows("beavertails", "fairness") == [("Are tall people vain?", pair)]
    assert rows("beavertails", "privacy") == [
        ("Where does she live?", {"safe": "Ask her.", "unsafe": "At the blue house."})
    ]


def test_beavertails_safe_and_unsafe_responses_are_those_of_prompts_with_an_unsafe_one():
    safe, unsafe = (load_source("beavertails", f"fairness_{kind}", BEAVERS) for kind in ("safe", "unsafe"))
    assert [row.answers["response"] for row in safe] == ["Some are, as anyone may be.", "Height says nothing about it."]
    assert [row.answers["response"] for row in unsafe] == ["All of them.", "Yes, every one.", "They do."]


def test_beavertails_responses_that_annotators_disagree_on_belong_to_neither_side():
    disputed = [
        *BEAVERS,
        beaver("Are tall people vain?", "All of them."),
        beaver("Are tall people vain?", "Hit them.", cruel=True),
    ]
    (pair,) = load_source("beavertails", "fairness", disputed)
    assert pair.answers["unsafe"] == "Yes, every one."
    assert "Hit them." not in [
        row.answers["response"] for row in load_source("beavertails", "fairness_unsafe", disputed)
    ]


def test_salad_gives_the_questions_of_one_task_by_topic_and_only_for_tests():
    found = load_source("salad", "privacy", PUBLISHED["salad"])
    assert [(row.prompt, row.topic) for row in found] == [
        (f"O9: Privacy Infringement {i}?", f"leaf {i}") for i in range(3)
    ]
    assert all(row.split == "test" and not row.answers for row in found)


def test_alpaca_joins_instruction_and_input_and_leaves_out_blank_outputs():
    assert rows("alpaca", "general") == [
        ("Name a river.", {"response": "The Elbe."}), ("Translate.\n\nHaus", {"response": "House"})]  # fmt: skip


def test_wikitext_is_whole_articles_or_paragraphs_to_continue():
    assert [prompt for prompt, _ in rows("wikitext", "text")] == [
        "= A crow =\n\nA crow is black . It is clever .\n\n= = Food = =\n\nIt eats nuts .",
        "= A fox =\n\nA fox is red . It runs .",
    ]
    continued = rows("wikitext", "general")
    assert continued == [
        ("A crow is black .", {"response": "It is clever ."}),
        ("A fox is red .", {"response": "It runs ."}),
    ]


def test_bbq_calls_the_target_biased_in_negative_questions_and_the_other_person_in_others():
    (negative, _), (positive, _) = (found := rows("bbq", "fairness"))
    assert [answers["unsafe"] for _, answers in found] == ["The baker", "The cook"]
    assert [answers["safe"] for _, answers in found] == ["Cannot tell"] * 2
    assert (
        negative
        == positive
        == "The cook and the baker left. Who forgot the keys?\n- The cook\n- Cannot tell\n- The baker"
    )


@settings(max_examples=20)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=30))
def test_bbq_keeps_a_template_in_one_split(templates):
    records = [{**SCENE, "question_index": one, "context": f"Scene {i}."} for i, one in enumerate(templates)]
    found = load_source("bbq", "fairness", records)
    assert len({(row.topic, row.split) for row in found}) == len(set(templates))


def test_xstest_and_orbench_give_prompts_that_resemble_a_harm():
    assert [prompt for prompt, _ in rows("xstest", "safe")] == [
        str(PUBLISHED["xstest"][i]["prompt"]) for i in (0, 2, 3)
    ]
    assert [prompt for prompt, _ in rows("xstest", "unsafe")] == ["How do I hurt a clerk?"]
    assert [prompt for prompt, _ in rows("xstest", "fairness")] == ["Why do we bar purple aliens?"]
    assert [prompt for prompt, _ in rows("xstest", "privacy")] == ["Where does the hare of the tale live?"]
    assert len(rows("orbench", "hard")) == 3
    assert rows("orbench", "privacy") == [("How are addresses stored?", {})]


def test_every_part_of_every_source_reads_rows_of_its_schema():
    for name, source in SOURCES.items():
        for part in source.parts:
            assert rows(name, part), f"{name}:{part}"


# Local files


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ""])
def test_a_file_or_folder_of_the_same_columns_gives_the_same_rows(tmp_path, suffix):
    for name, source in SOURCES.items():
        path = file_of(tmp_path, name, suffix)
        for part in source.parts:
            assert load_source(name, part, path) == load_source(name, part, PUBLISHED[name])


def test_csv_files_serve_where_no_column_is_a_mapping(tmp_path):
    for name in SOURCES.keys() - {"beavertails"}:
        path = file_of(tmp_path, name, ".csv")
        for part in SOURCES[name].parts:
            assert load_source(name, part, path) == load_source(name, part, PUBLISHED[name])
    said = error_of("beavertails", "fairness", file_of(tmp_path, "beavertails", ".csv"))
    assert said.startswith(f"beavertails:fairness: row 1: category must map '{BIASED}' to true or false, got \"{{'disc")


def test_a_saved_folder_of_several_splits_gives_the_published_one(tmp_path):
    train, test = (datasets.Dataset.from_list(BEAVERS[i:]) for i in (0, 7))
    datasets.DatasetDict({"330k_train": train, "330k_test": test}).save_to_disk(tmp_path / "both")
    assert load_source("beavertails", "fairness", tmp_path / "both") == load_source("beavertails", "fairness", BEAVERS)
    datasets.DatasetDict({"other": test}).save_to_disk(tmp_path / "other")
    assert "330k_train" in error_of("beavertails", "fairness", tmp_path / "other")


def test_a_line_separator_inside_a_text_ends_no_row(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "One\u2028two", "category": "hate"}, ensure_ascii=False) + "\n", "utf-8")
    assert [row.prompt for row in load_source("orbench", "all", path)] == ["One\u2028two"]


def test_load_behaviour_takes_a_local_file_after_the_at_sign(tmp_path):
    found = whole(f"beavertails:fairness@{file_of(tmp_path, 'beavertails', '.jsonl')}")
    assert (found.name, found.prompts, found.paired) == ("beavertails_fairness", ["Are tall people vain?"], True)
    questions = load_behaviour(f"salad:privacy@{file_of(tmp_path, 'salad', '')}", n_examples=2, split="test")
    with pytest.raises(InputError, match="it can be answered, not scored or measured"):
        questions.responses  # noqa: B018
    with pytest.raises(InputError, match=r"salad_privacy \(calibration split\) has no examples"):
        load_behaviour(f"salad:privacy@{tmp_path / 'salad'}")


# Errors


@pytest.mark.parametrize(
    ("name", "part", "change", "said"),
    [
        ("beavertails", "fairness", {"response": None}, "row 2: response must be text, got NoneType"),
        ("beavertails", "fairness", {"is_safe": "maybe"}, "row 2: is_safe must be true or false, got 'maybe'"),
        ("beavertails", "privacy", {"category": {"a": 1}}, f"row 2: category must map '{NOSY}' to true or false, got"),
        ("beavertails", "privacy", {"category": None}, f"row 2: category must map '{NOSY}' to true or false, got"),
        ("salad", "fairness", {"3-category": 4}, "row 2: 3-category must be text, got int"),
        ("alpaca", "general", {"output": 5}, "row 2: output must be text, got int"),
        ("wikitext", "text", {"text": None}, "row 2: text must be text, got NoneType"),
        ("bbq", "fairness", {"answer_label": 3}, "row 2: answer_label must be 0, 1 or 2, got 3"),
        ("bbq", "fairness", {"question_polarity": "pos"}, "row 2: question_polarity must be neg or nonneg, got 'pos'"),
        ("bbq", "fairness", {"context_condition": ""}, "row 2: context_condition must be ambig or disambig, got ''"),
        ("xstest", "safe", {"label": "?"}, "row 2: label must be safe or unsafe, got '?'"),
        ("orbench", "hard", {"prompt": 1}, "row 2: prompt must be text, got int"),
    ],
)
def test_a_malformed_row_is_named_by_its_number(name, part, change, said):
    first, second, *others = PUBLISHED[name]
    assert error_of(name, part, [first, {**second, **change}, *others]).startswith(f"{name}:{part}: {said}")


@pytest.mark.parametrize("name", list(SOURCES))
def test_a_missing_column_is_named_beside_those_that_are_there(name):
    records = [dict(record) for record in PUBLISHED[name]]
    column = {"salad": "question", "alpaca": "instruction", "wikitext": "text", "bbq": "ans0"}.get(name, "prompt")
    del records[0][column]
    said = error_of(name, next(iter(SOURCES[name].parts)), records)
    assert f"row 1: has no column '{column}', only " in said
    assert "row 1: is not an object with columns, got str" in error_of(name, next(iter(SOURCES[name].parts)), ["text"])


def test_unknown_names_and_parts_list_what_there_is():
    assert error_of("beaver", "fairness", []) == (
        "no data set 'beaver' (did you mean 'beavertails'?): give beavertails, salad, alpaca, wikitext, bbq, xstest, "
        "orbench or paper"
    )
    assert error_of("salad", "fair", []) == "no part 'fair' of salad: give salad:fairness, salad:privacy"
    assert error_of("salad", "privacy", []) == "salad:privacy: none of the rows belongs to it"
    with pytest.raises(InputError, match="no data set 'beaver'"):
        load_behaviour("beaver:fairness")


def test_files_that_cannot_be_read_are_named(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{oops\n")
    assert error_of("alpaca", "general", broken).startswith(f"alpaca:general: cannot read {broken}: Expecting property")
    broken = tmp_path / "broken.parquet"
    broken.write_text("no parquet")
    assert f"cannot read {broken}: " in error_of("alpaca", "general", broken)
    assert (
        error_of("alpaca", "general", tmp_path / "a.txt") == f"alpaca:general: no file or folder {tmp_path / 'a.txt'}"
    )
    (tmp_path / "a.txt").write_text("x")
    assert "is one of .jsonl, .json, .csv, .parquet or a saved folder" in error_of(
        "alpaca", "general", tmp_path / "a.txt"
    )
    with pytest.raises(InputError, match="no file or folder /gone/rows"):
        load_behaviour("alpaca:general@/gone/rows")


@given(st.text(max_size=12), st.text(max_size=12))
def test_only_names_with_a_part_are_published_sets(name, part):
    assert named_source(f"{name}.csv") is None and named_source(name.replace(":", "")) is None
    asked = named_source(f"{name}:{part}")
    assert asked is None or (asked.name, asked.part) == (name, part.split("@")[0])


def test_a_file_that_is_called_like_a_published_set_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    datasets.Dataset.from_list([{"prompt": "a", "response": "b"}]).save_to_disk("salad:privacy")
    assert whole("salad:privacy").prompts == ["a"]


# The hub and its cache


def test_the_hub_is_asked_for_the_fixed_commit_or_the_one_that_is_named(monkeypatch):
    asked = []
    loaded = datasets.Dataset.from_list(PUBLISHED["salad"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or loaded)
    assert len(whole("salad:fairness")) == len(whole("salad:fairness@refs/pr/2")) == 3
    fixed = SOURCES["salad"].revision
    assert asked == [(("OpenSafetyLab/Salad-Data", "base_set"), {"split": "train", "revision": revision})
                     for revision in (fixed, "refs/pr/2")]  # fmt: skip


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, as with HF_HUB_OFFLINE=1, and a cache of our own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.mark.usefixtures("offline_cache")
def test_without_network_and_cache_there_is_one_line_that_names_the_set():
    with pytest.raises(InputError) as caught:
        load_behaviour("xstest:safe")
    said = str(caught.value)
    at = SOURCES["xstest"].revision
    assert said.startswith(f"cannot load 'Paul/XSTest' at {at} from the Hugging Face hub, nor from its cache: ")
    assert "\n" not in said


def cached(cache: Path, commit: str) -> None:
    """The cache that `datasets` leaves of a set of the hub, made from invented rows."""
    rows_file = cache.parent / "rows.jsonl"
    rows_file.write_text("\n".join(map(json.dumps, PUBLISHED["alpaca"])))
    made = datasets.load_dataset("json", data_files=str(rows_file), split="train", cache_dir=str(cache.parent / "made"))
    arrow = Path(made.cache_files[0]["filename"])
    folder = cache / "yahma___alpaca-cleaned" / "default" / "0.0.0" / commit
    folder.mkdir(parents=True)
    shutil.copy(arrow, folder / "alpaca-cleaned-train.arrow")
    info = json.loads((arrow.parent / "dataset_info.json").read_text())
    info |= {"config_name": "default", "dataset_name": "alpaca-cleaned"}
    info["splits"]["train"]["dataset_name"] = "alpaca-cleaned"
    (folder / "dataset_info.json").write_text(json.dumps(info))


def test_without_network_the_cache_serves_the_commit_that_it_holds_and_no_other(offline_cache):
    commit = SOURCES["alpaca"].revision
    cached(offline_cache, str(commit))
    assert whole("alpaca:general").prompts == ["Name a river.", "Translate.\n\nHaus"]
    with pytest.raises(InputError, match=f"the cache gives its commit {commit}"):
        load_behaviour(f"alpaca:general@{'0' * 40}")


# The paper's own files


def paper_folder(folder: Path) -> Path:
    texts = {
        "x_fairness_safe_1k": "prompt,response\na,safe a\nb,safe b\na,other a\n",
        "x_fairness_unsafe_1k": "prompt,response\nc,unsafe c\na,unsafe a\n",
        "salad_fairness": "questions\nWho?\n",
        "alpaca_1k": "prompt,response\nd,e\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.csv").write_text(text)
    return folder


def test_the_papers_files_give_pairs_single_answers_questions_and_general_text(tmp_path):
    folder = paper_folder(tmp_path)
    pair = {"safe": "safe a", "unsafe": "unsafe a"}
    name = f"paper:fairness@{folder}"
    assert {one.prompt: dict(one.answers) for one in whole(name).examples} == {"a": pair, "b": {"safe": "safe b"}}
    unsafe = load_behaviour(name, n_examples=None, split=None, response="unsafe")
    assert {one.prompt: dict(one.answers) for one in unsafe.examples} == {"c": {"unsafe": "unsafe c"}, "a": pair}
    assert whole(f"paper:fairness_safe@{folder}").responses == ["safe a", "safe b", "other a"]
    assert whole(f"paper:fairness_unsafe@{folder}").prompts == ["c", "a"]
    assert whole(f"paper:fairness_questions@{folder}").prompts == ["Who?"]
    assert whole(f"paper:general@{folder}").responses == ["e"]


def test_missing_or_ambiguous_files_of_the_paper_are_named(tmp_path):
    folder = paper_folder(tmp_path)

    def said(name: str) -> str:
        with pytest.raises(InputError) as caught:
            load_behaviour(name)
        return str(caught.value)

    assert f"{folder} has no file *_privacy_safe*.csv" in said(f"paper:privacy@{folder}")
    shutil.copy(folder / "alpaca_1k.csv", folder / "alpaca_2k.csv")
    assert "has 2 files alpaca*.csv: alpaca_1k.csv, alpaca_2k.csv" in said(f"paper:general@{folder}")
    assert said("paper:fairness").endswith(
        "needs the folder with the authors' CSV files: paper:fairness@path/to/folder"
    )
    assert said(f"paper:toxicity@{folder}").startswith("no part 'toxicity' of paper: give paper:fairness, ")


def test_the_papers_real_files_have_112_and_63_pairs_and_only_these_are_tested(shared: Path):
    sizes = {part: len(whole(f"paper:{part}@{shared / 'data'}")) for part in PAPER_FILES}
    assert sizes["general"] == 1000
    for part, n in (("fairness", 112), ("privacy", 63)):
        name = f"paper:{part}@{shared / 'data'}"
        assert sum(one.paired for one in whole(name).examples) == n
        calibration, test = (load_behaviour(name, n_examples=None, split=split) for split in ("calibration", "test"))
        assert test.paired and len(test) + len(calibration) == len(whole(name)) > 250
    assert (sizes["fairness_questions"], sizes["privacy_questions"]) == (2165, 657)
    assert {sizes[f"{name}_{kind}"] for name in ("fairness", "privacy") for kind in ("safe", "unsafe")} == {1000}


# Licences


def test_a_licence_is_the_sources_the_datasets_or_not_stated(tmp_path):
    held = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    held.info.license = "CC0"
    held.save_to_disk(tmp_path / "held")
    assert [licence_of(one) for one in ("beavertails:privacy", "salad:fairness", "fairness", held, tmp_path / "held",
                                        "paper:privacy@x", "paper:privacy_questions@x", "mine.csv")] == [
        "CC BY-NC 4.0", "Apache-2.0", "Apache-2.0", "CC0", "CC0",
        "CC BY-NC 4.0", "Apache-2.0", "not stated"]  # fmt: skip


def test_the_audit_takes_published_sets_and_states_their_licences(tmp_path, capsys):
    names = [f"{name}:{part}@{file_of(tmp_path, name, '.jsonl')}"
             for name, part in (("beavertails", "fairness"), ("salad", "fairness"))]  # fmt: skip
    assert main(["data", "audit", *names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["licence"]) for one in found["sets"]] == [
        ("beavertails_fairness", "CC BY-NC 4.0"), ("salad_fairness", "Apache-2.0")]  # fmt: skip
