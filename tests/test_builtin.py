"""The built-in sets keep what docs/data_card.md promises. A row that breaks a promise is rewritten, not the promise."""

import csv
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.resources import files
from itertools import combinations
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.tree import DecisionTreeClassifier

from dean_interp.data.examples import load_behaviour
from dean_interp.errors import InputError
from dean_interp.evaluation.judges.lexical import is_cautious, lexical_labels

NAMES = ("fairness", "privacy", "general")
PAIRED = ("fairness", "privacy")
SPLITS = ("calibration", "test")
FIELDS = {**dict.fromkeys(PAIRED, ("prompt", "safe", "unsafe")), "general": ("prompt", "response")}


def _read(name: str) -> list[dict[str, str]]:
    text = (files("dean_interp.data") / "builtin" / f"{name}.jsonl").read_text("utf-8")
    return [json.loads(line) for line in text.splitlines()]


ROWS = {name: _read(name) for name in NAMES}
ALL = [(name, row) for name in NAMES for row in ROWS[name]]

# Sizes, splits, fields


@pytest.mark.parametrize("name", NAMES)
def test_every_set_has_at_least_320_distinct_prompts_in_at_least_30_scenarios(name):
    plain = {" ".join(_words(row["prompt"])) for row in ROWS[name]}
    assert len(plain) == len(ROWS[name]) >= 320
    topics = Counter(row["topic"] for row in ROWS[name])
    assert len(topics) >= 30
    assert set(topics.values()) == {8}


@pytest.mark.parametrize("name", NAMES)
def test_half_of_a_set_is_for_calibration_half_for_test_and_no_topic_is_in_both(name):
    sides = Counter(row["split"] for row in ROWS[name])
    assert set(sides) == set(SPLITS)
    assert abs(sides["calibration"] - sides["test"]) <= 1
    calibration, test = ({row["topic"] for row in ROWS[name] if row["split"] == side} for side in SPLITS)
    assert not calibration & test


def test_no_prompt_and_no_answer_is_there_twice_in_any_set():
    texts = Counter(" ".join(_words(row[field])) for name, row in ALL for field in FIELDS[name])
    assert [text for text, n in texts.items() if n > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_a_topic_and_all_its_answers_and_nothing_else(name):
    for row in ROWS[name]:
        assert set(row) == {"split", "topic", *FIELDS[name]}, row["prompt"]
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", row["topic"])


@pytest.mark.parametrize("name", NAMES)
def test_the_package_loads_both_halves_whole_and_draws_the_default_number(name):
    for split in SPLITS:
        half = load_behaviour(name, n_examples=None, split=split)
        assert half.prompts == [row["prompt"] for row in ROWS[name] if row["split"] == split]
        assert half.paired == (name in PAIRED)
        assert len(load_behaviour(name, split=split)) == 128


# Form: lengths, clean text, no fixed openings


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_answers_are_short_and_cleanly_typed(name):
    for row in ROWS[name]:
        assert 20 <= len(row["prompt"]) <= 320, row["prompt"]
        for field in FIELDS[name]:
            assert field == "prompt" or 60 <= len(row[field]) <= 260, row[field]
            assert row[field] == " ".join(row[field].split()), row[field]
            assert row[field].isprintable(), row[field]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("size", [len, lambda text: len(text.split())], ids=["characters", "words"])
def test_neither_kind_of_answer_is_longer_on_average_by_more_than_a_tenth(name, split, size):
    safe, unsafe = (mean(size(row[k]) for row in ROWS[name] if row["split"] == split) for k in ("safe", "unsafe"))
    assert 1 / 1.1 < safe / unsafe < 1.1


@pytest.mark.parametrize("name", NAMES)
def test_no_three_opening_words_are_shared_by_more_than_three_texts_of_a_kind(name):
    for field in FIELDS[name]:
        openings = Counter(tuple(_words(row[field])[:3]) for row in ROWS[name])
        assert openings.most_common(1)[0][1] <= 3, openings.most_common(3)


# No leak between the splits: names, near-duplicates, other people's text

# Capitalised inside a sentence, and no person's name: what may stand in the other split's half of the alphabet, or in
# both splits. A word that nothing uses any more must leave the list.
PLACES = """
Alexandria Altiplano Amazon Andes Angola Athens Atlantic Auckland Belize Birmingham Bolivia Brazil Buenos Aires Cantal
Caribbean Carthage Chile China Colombia Cusco Dublin Ecuador Galapagos Germany Giza Goa Guiana Iraq Johannesburg La
Leeds Lima London Lyon Maldives Mesopotamia Montreal Mozambique Nairobi New Zealand Ohio Ontario Oslo Oxford Paris
Pretoria Punjab Rotterdam Sahara Sahel Santa Sudan São Paulo Tanganyika Toronto Victoria Lake Lane Mill Mountains Road
Town Valley East North South Western High Upper Rift Middle Democratic Republic Union United Nations Opera Quay
""".split()
PEOPLES_AND_LANGUAGES = """
Afghan Afghans African American Arab Arabic Asian Black Brahmin Brummie Chinese Christians Dalit Egyptians English
Eritrean Estonian European Filipino Finnish French German Germanic Glaswegian Hungarian Indian Japanese Jewish Jews
Korean Mandarin Muslim Namibian Nigerian Norman Norwegian Polish Portuguese Roma Romanian Russian Russians Sahrawi
Scottish Scouse Scouser Sicilian Somali Swedish Swiss Syrian Thai Tigrinya Vietnamese
""".split()
CALENDAR = """
January February March April May June August September October December Monday Tuesday Thursday Friday Saturday Sunday
Day Year Ages Christmas Easter Valentine
""".split()
TITLES = "Daddy Dr Gran Grandma Grandpa Mr Mrs Ms Mum Sir".split()
THINGS_AND_EPONYMS = """
Down Great Parkinson Perseid Perseids Pluto Saturn Schrader Snow White Sun STIs IDs Bench Chemistry Lab Lunchbox Rocket
Science
""".split()
QUOTED_WORDS = "Amount And Das Date Does Don Gift Guess Like Ma My None One Please Text The Walking".split()
NOT_NAMES = {*PLACES, *PEOPLES_AND_LANGUAGES, *CALENDAR, *TITLES, *THINGS_AND_EPONYMS, *QUOTED_WORDS}


def _texts(side: str) -> Iterator[str]:
    return (row[field] for name, row in ALL for field in FIELDS[name] if row["split"] == side)


def _capitalised(side: str) -> set[str]:
    """Words of a split with a capital letter inside a sentence."""
    found = set()
    for text in _texts(side):
        for match in re.finditer(r"[^\W\d_]+", text):
            word, before = match.group(), text[: match.start()].rstrip(" '(")
            if word[0].isupper() and not word.isupper() and before and before[-1] not in ".!?:":
                found.add(word)
    return found


@pytest.mark.parametrize(("side", "letters"), [("calibration", "ABCDEFGHIJKLM"), ("test", "NOPQRSTUVWXYZ")])
def test_names_of_people_begin_with_a_to_m_in_calibration_and_n_to_z_in_test(side, letters):
    assert sorted(word for word in _capitalised(side) - NOT_NAMES if word[0] not in letters) == []


@pytest.mark.parametrize(("side", "other"), [SPLITS, SPLITS[::-1]])
def test_no_name_is_in_both_splits_in_whatever_case(side, other):
    here, there = (re.findall(r"[^\W\d_]+", " ".join(_texts(one))) for one in (side, other))
    names = {word for word in _capitalised(side) - NOT_NAMES if word.lower() not in here}  # the rest are plain words
    assert len(names) > 50
    assert sorted(names & {word.capitalize() for word in there}) == []


def test_the_list_of_words_that_are_no_names_holds_nothing_unused():
    assert sorted(NOT_NAMES - _capitalised("calibration") - _capitalised("test")) == []


def test_no_two_prompts_are_near_duplicates_within_or_across_sets_and_splits():
    """Word-trigram Jaccard below 0.15, over all half a million pairs; only pairs that share a trigram are formed."""
    trigrams = [_ngrams(row["prompt"], 3) for _, row in ALL]
    prompts_with = defaultdict(list)
    for i, grams in enumerate(trigrams):
        for gram in grams:
            prompts_with[gram].append(i)
    shared = Counter(pair for prompts in prompts_with.values() for pair in combinations(prompts, 2))
    similarity = {(i, j): n / len(trigrams[i] | trigrams[j]) for (i, j), n in shared.items()}
    (i, j), largest = max(similarity.items(), key=lambda item: item[1])
    assert largest < 0.15, (largest, ALL[i][1]["prompt"], ALL[j][1]["prompt"])


def test_no_eight_words_in_a_row_come_from_the_papers_files():
    folder = Path(os.environ.get("DEAN_INTERP_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"the paper's data are not in {folder} (set DEAN_INTERP_SHARED)")
    ours = {gram for name, row in ALL for field in FIELDS[name] for gram in _ngrams(row[field], 8)}
    paths = sorted(folder.glob("*.csv"))
    assert len(paths) >= 7
    for path in paths:
        with path.open(encoding="utf-8-sig", newline="") as file:
            theirs = {gram for row in csv.reader(file) for cell in row for gram in _ngrams(cell, 8)}
        assert not ours & theirs, path.name


def _words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def _ngrams(text: str, n: int) -> set[tuple[str, ...]]:
    words = _words(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


# No shortcut from surface to label. Chance is 0.5 of 672 answers; folds never share a topic.


def _accuracy(name: str, model: object, view: object) -> float:
    """Cross-validated accuracy of telling safe from unsafe answers of scenarios that were not trained on."""
    answers = [(row[kind], kind, row["topic"]) for row in ROWS[name] for kind in ("safe", "unsafe")]
    texts, kinds, topics = zip(*answers, strict=True)
    seen = [view(text) for text in texts]
    return cross_val_score(model, seen, kinds, groups=topics, cv=GroupKFold(6)).mean()


def _bag() -> object:
    return make_pipeline(CountVectorizer(token_pattern=r"\S+", binary=True), LogisticRegression(max_iter=1000))


@pytest.mark.parametrize("name", PAIRED)
def test_length_alone_does_not_tell_safe_from_unsafe(name):
    """Measured 0.51 for fairness and 0.51 for privacy."""
    tree = DecisionTreeClassifier(max_depth=4, random_state=0)
    assert _accuracy(name, tree, lambda text: [len(text), len(text.split())]) < 0.58


@pytest.mark.parametrize("name", PAIRED)
def test_the_longer_answer_of_a_pair_is_not_mostly_the_safe_one(name):
    """Measured 0.60 for fairness and 0.61 for privacy: a slight lean that the averages do not show."""
    longer = np.mean([np.sign(len(row["safe"]) - len(row["unsafe"])) for row in ROWS[name]]) / 2 + 0.5
    assert 0.35 < longer < 0.65


@pytest.mark.parametrize("name", PAIRED)
def test_the_first_word_alone_does_not_tell_safe_from_unsafe(name):
    """Measured 0.60 for fairness and 0.61 for privacy."""
    assert _accuracy(name, _bag(), lambda text: text.split()[0]) < 0.66


@pytest.mark.parametrize("name", PAIRED)
def test_words_without_their_order_do_not_settle_what_is_safe(name):
    """Measured 0.78 for both: what is advised shows in the words, as it should, but a bag of them often errs."""
    assert _accuracy(name, _bag(), str.lower) < 0.85


OVER_REFUSAL = ("over_refusal_fairness", "over_refusal_privacy")


@pytest.mark.parametrize("name", OVER_REFUSAL)
def test_an_over_refusal_set_is_large_enough_and_all_test(name):
    rows = load_behaviour(name, n_examples=None, split="test").examples
    topics = [row.topic for row in rows]
    assert len(rows) >= 80 and len(set(topics)) >= 8
    assert min(topics.count(topic) for topic in topics) >= 4
    with pytest.raises(InputError, match="has no examples"):
        load_behaviour(name, split="calibration")


@pytest.mark.parametrize("name", OVER_REFUSAL)
def test_over_refusal_prompts_are_their_own_and_their_answers_plain(name):
    rows = load_behaviour(name, n_examples=None, split="test").examples
    others = [prompt for other in ("fairness", "privacy", "general", *OVER_REFUSAL) if other != name
              for prompt in load_behaviour(other, n_examples=None, split=None).prompts]  # fmt: skip
    prompts = [row.prompt for row in rows]
    assert len(set(prompts)) == len(prompts) and not set(prompts) & set(others)
    answers = [row.answers["response"] for row in rows]
    assert set(lexical_labels(answers)) == {"safe"} and not any(map(is_cautious, answers))
    assert all(5 <= len(answer.split()) <= 45 for answer in answers)
