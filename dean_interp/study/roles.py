"""Roles of examples: some choose the gates, some the dose, and what is left confirms. No prompt has two roles.

A rise on the prompts that chose an edit is no evidence. So each behaviour's examples are divided three ways, whole
topics together, and general text likewise: `score` (gains, damage), `choose` (the dose), `confirm` (the result).
"""

import dataclasses
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import itemgetter
from typing import Literal

import numpy as np

from dean_interp.data.examples import Behaviour, Example, load_behaviour, prompt_hashes_of
from dean_interp.data.leakage import all_without_leaks, near_groups
from dean_interp.errors import InputError

log = logging.getLogger(__name__)
Division = Literal["own split", "topic", "prompt"]
SHARES = {"score": 13 / 42, "choose": 8 / 42, "confirm": 21 / 42}
"""Share of the topics that each role gets where a file does not say which half is for testing."""
FEWEST = {"score": 6, "choose": 2, "confirm": 4}
"""Fewest topics (prompts, where there are none) of a role. 6 allow 31 ways to flip labels by topic."""


@dataclass(frozen=True)
class RoleCount:
    """The examples of one set by role."""

    name: str
    divided_by: str
    n_examples: Mapping[str, int]
    n_topics: Mapping[str, int]
    """Number of topics (prompts, where they have none) of each role."""
    n_left_out: int
    """Number of prompts that are left out, since they are (nearly) those of an earlier role."""


@dataclass(frozen=True)
class Roles:
    """The examples of one data set by role."""

    score: Behaviour
    choose: Behaviour
    confirm: Behaviour
    divided_by: Division
    """`own split`: its test topics confirm, its calibration topics score and choose. `topic`: its halves share topics,
    so all topics were divided anew. `prompt`: it has no topics, and near duplicates stay together."""
    n_left_out: int
    """Number of prompts that are left out, since they are (nearly) those of an earlier role."""

    @property
    def all(self) -> tuple[Behaviour, Behaviour, Behaviour]:
        """Score, choose, confirm."""
        return self.score, self.choose, self.confirm


@dataclass(frozen=True)
class RoleSizes:
    """Number of examples of each role; fewer where the data has fewer."""

    score: int
    choose: int
    confirm: int


def roles_of(source: str, sizes: RoleSizes, *, seed: int = 0, paired: bool = True) -> Roles:
    """The examples of a data set by role.

    Args:
        source: as `load_behaviour` takes it.
        sizes: how many examples of each role are drawn.
        seed: seed of the draws. Which topic has which role depends on its name alone.
        paired: whether prompts have a safe and an unsafe answer, and those without both are left out; else they have
            one answer.

    Raises:
        InputError: no prompt with both answers, or some with both where one is wanted; too few topics for three roles.
    """
    whole = load_behaviour(source, n_examples=None, split=None)
    if paired:
        whole = _with_both_answers(whole)
    elif whole.paired:
        raise InputError(
            f"'{whole.name}' has a safe and an unsafe answer to each prompt: other text has one answer, in the columns "
            "prompt,response"
        )
    divided_by, parts = _divided(source, whole)
    n_clusters = len({example.cluster for example in whole.examples})
    wanted = dataclasses.asdict(sizes)
    drawn: dict[str, Behaviour] = {}
    n_left_out = 0
    for role, examples in parts.items():
        _refuse_few(whole.name, role, examples=examples, divided_by=divided_by, n_in_all=n_clusters)
        part = dataclasses.replace(whole, examples=tuple(examples), split=_SPLIT[role])
        # A prompt that is nearly one of an earlier role would confirm what was chosen on it.
        ((clean, leaked),) = all_without_leaks([part], list(drawn.values()))
        _refuse_few(whole.name, role, examples=clean.examples, divided_by=divided_by, n_in_all=n_clusters)
        n_left_out += len(leaked.exact) + len(leaked.near)
        drawn[role] = drawn_evenly(clean, wanted[role], seed=seed)
    return Roles(**drawn, divided_by=divided_by, n_left_out=n_left_out)


def halves_of(source: str) -> tuple[Behaviour | None, Behaviour]:
    """The examples of a data set that may be scored, and those that confirm, divided as by `roles_of`.

    The first is None where fewer than two of its topics (prompts, where there are none) may be scored.
    """
    whole = load_behaviour(source, n_examples=None, split=None)
    _, parts = _divided(source, whole)
    confirm = dataclasses.replace(whole, examples=tuple(parts["confirm"]), split="test")
    scored = (*parts["score"], *parts["choose"])
    n_clusters = len({example.cluster for example in scored})
    if n_clusters < 2:
        return None, confirm
    return dataclasses.replace(whole, examples=scored, split="calibration"), confirm


def drawn_evenly(behaviour: Behaviour, n_examples: int, *, seed: int) -> Behaviour:
    """Examples at random, as many of each topic as can be; all where there are fewer than `n_examples`."""
    order = np.random.default_rng(seed).permutation(len(behaviour))
    n_taken = Counter[str]()
    turns = []
    for row in order.tolist():
        example = behaviour.examples[row]
        turns.append((n_taken[example.cluster], example))
        n_taken[example.cluster] += 1
    # The first of each topic come first, then the second of each; among them the order stays.
    turns.sort(key=itemgetter(0))
    drawn = [example for _, example in turns[:n_examples]]
    return dataclasses.replace(behaviour, examples=tuple(drawn))


_SPLIT: dict[str, Literal["calibration", "test"]] = {"score": "calibration", "choose": "test", "confirm": "test"}
"""What the parts call themselves: `measure` refuses calibration examples, and choosing measures."""


def refuse_shared(roles: Sequence[Roles], others: Sequence[Behaviour] = ()) -> None:
    """Raise `InputError` where two data sets share prompts: then one would answer for the other."""
    hashes_of: dict[str, frozenset[str]] = {}
    for of_set in roles:
        hashes_of[of_set.score.name] = prompt_hashes_of(of_set.all)
    for behaviour in others:
        hashes_of[behaviour.name] = behaviour.prompt_hashes
    for first, second in combinations(hashes_of, 2):
        n_shared = len(hashes_of[first] & hashes_of[second])
        if n_shared:
            raise InputError(
                f"'{first}' and '{second}' share {n_shared} prompts: first, second, general and register must be four "
                "sets that share none"
            )


def _with_both_answers(whole: Behaviour) -> Behaviour:
    """The prompts with a safe and an unsafe answer, as the paper's files have some. Raises `InputError` for none."""
    pairs = tuple(example for example in whole.examples if example.paired)
    if not pairs:
        raise InputError(
            f"'{whole.name}' has no prompt with a safe and an unsafe answer: the gain of a neuron is that for the "
            "margin between the two, so it needs the columns prompt,safe,unsafe"
        )
    if len(pairs) < len(whole):
        counts = f"{len(pairs)} of {len(whole)} prompts"
        log.warning("%s: %s have a safe and an unsafe answer; the others are left out", whole.name, counts)
    return dataclasses.replace(whole, examples=pairs)


def _divided(source: str, whole: Behaviour) -> tuple[Division, dict[str, list[Example]]]:
    """The examples of each role, and what they were divided by."""
    clusters = _clusters(whole)
    has_topics = any(example.topic for example in whole.examples)
    test_prompts = set(load_behaviour(source, n_examples=None, split="test").prompts)
    in_test, in_calibration = set(), set()
    for example, cluster in zip(whole.examples, clusters, strict=True):
        if example.prompt in test_prompts:
            in_test.add(cluster)
        else:
            in_calibration.add(cluster)
    shares_topics = has_topics and bool(in_test & in_calibration)
    if shares_topics:
        # Halves that share topics are no halves: all topics are divided anew.
        order = _in_order(in_test | in_calibration)
        n_score = round(len(order) * SHARES["score"])
        n_choose = round(len(order) * SHARES["choose"])
    else:
        # The test half confirms, the rest scores and chooses in the same proportion.
        order = _in_order(in_calibration - in_test)
        share_of_both = SHARES["score"] + SHARES["choose"]
        n_score = round(len(order) * SHARES["score"] / share_of_both)
        n_choose = len(order) - n_score
    # What neither scores nor chooses confirms.
    role_of = dict.fromkeys(in_test | in_calibration, "confirm")
    role_of |= dict.fromkeys(order[:n_score], "score")
    role_of |= dict.fromkeys(order[n_score : n_score + n_choose], "choose")
    parts: dict[str, list[Example]] = {role: [] for role in SHARES}
    for example, cluster in zip(whole.examples, clusters, strict=True):
        parts[role_of[cluster]].append(example)
    if not has_topics:
        return "prompt", parts
    return "topic" if shares_topics else "own split", parts


def _clusters(whole: Behaviour) -> list[str]:
    """What must stay in one role: a topic, else prompts that are near duplicates of each other."""
    if all(example.topic for example in whole.examples):
        return [example.topic or "" for example in whole.examples]
    groups = near_groups(whole.prompts)
    clusters = []
    for example, group in zip(whole.examples, groups, strict=True):
        clusters.append(example.topic or f"prompt {group}")
    return clusters


def _in_order(clusters: set[str]) -> list[str]:
    """Clusters in an order that depends on their names alone, and not on the alphabet."""

    def sha256(cluster: str) -> str:
        return hashlib.sha256(cluster.encode()).hexdigest()

    return sorted(clusters, key=sha256)


def _refuse_few(name: str, role: str, examples: Sequence[Example], divided_by: Division, n_in_all: int) -> None:
    """Raise `InputError` where the examples of a role are of too few topics, or prompts."""
    n_clusters = len({example.cluster for example in examples})
    if n_clusters >= FEWEST[role]:
        return
    kind, advice = "prompt", ""
    if divided_by != "prompt":
        kind, advice = "topic", ", or leave the column `topic` out, and each prompt counts as one"
    in_all = f"only one {kind}" if n_in_all == 1 else f"{n_in_all} {kind}s"
    enough = 2 * sum(FEWEST.values())
    raise InputError(
        f"'{name}' has {in_all}, and of them {n_clusters} to {role} with; at least {FEWEST[role]} are needed to "
        f"{role}: give data of {enough} {kind}s or more{advice}"
    )
