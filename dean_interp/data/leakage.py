"""Near duplicates of prompts, and test sets without the prompts that calibration holds too.

Prompts are compared by their letters and digits in lower case (`exact`; `prompt_text.normalised`), and by the Jaccard
similarity of their word trigrams (`near`). Candidates for the latter come from MinHash (Broder 1997; `datasketch`), and
each is checked by its true similarity, so nothing is counted that is not near; of pairs at the threshold a few are
missed.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from datasketch import MinHash, MinHashLSH

from dean_interp.data.examples import Behaviour
from dean_interp.data.prompt_text import normalised
from dean_interp.errors import InputError

NEAR = 0.7
"""Jaccard similarity of word trigrams from which two prompts count as near duplicates."""
Likeness = Literal["exact", "near"]
_N_HASHES = 128
_LEAST_THRESHOLD = 0.05
"""Below it an index cannot be built of so many hashes."""


@dataclass(frozen=True)
class Leaked:
    """Test prompts that calibration holds too, each once, in the order of the test set."""

    name: str
    """The name of the test set."""
    n_prompts: int
    """Distinct prompts of the test set, these among them."""
    exact: tuple[str, ...]
    """Prompts that are calibration prompts, normalised."""
    near: tuple[str, ...]
    """Further prompts that are near duplicates of a calibration prompt."""


def without_leaks(
    test: Behaviour,
    calibration: Sequence[Behaviour],
    *,
    threshold: float = NEAR,
) -> tuple[Behaviour, Leaked]:
    """The test examples whose prompts are no exact or near duplicates of a calibration prompt, and the others' prompts.

    Raises `InputError` where none is left.
    """
    (clean,) = all_without_leaks([test], calibration, threshold=threshold)
    return clean


def all_without_leaks(
    tests: Sequence[Behaviour], calibration: Sequence[Behaviour], *, threshold: float = NEAR
) -> list[tuple[Behaviour, Leaked]]:
    """Do the same for several test sets: the calibration prompts are hashed once."""
    check_threshold(threshold)
    prompts = []
    for behaviour in calibration:
        prompts += behaviour.prompts
    index = PromptIndex(prompts, threshold)
    return [_without(test, index) for test in tests]


def _without(test: Behaviour, calibration: "PromptIndex") -> tuple[Behaviour, Leaked]:
    likeness = calibration.likeness(PromptIndex(test.prompts, calibration.threshold))
    kept = []
    for example in test.examples:
        if likeness[normalised(example.prompt)] is None:
            kept.append(example)
    if not kept:
        raise InputError(f"every test prompt of '{test.name}' is among the calibration prompts: give other test data")
    prompts = list(dict.fromkeys(test.prompts))
    exact = [prompt for prompt in prompts if likeness[normalised(prompt)] == "exact"]
    near = [prompt for prompt in prompts if likeness[normalised(prompt)] == "near"]
    leaked = Leaked(
        name=test.name,
        n_prompts=len(prompts),
        exact=tuple(exact),
        near=tuple(near),
    )
    return dataclasses.replace(test, examples=tuple(kept)), leaked


def near_groups(prompts: Sequence[str], *, threshold: float = NEAR) -> list[int]:
    """The group of each prompt, by number: near duplicates are in one group, and their near duplicates with them.

    A group's number is the place of its first prompt.
    """
    check_threshold(threshold)
    keys = [normalised(prompt) for prompt in prompts]
    # every prompt is a group of its own, whose number is the place of the first prompt of that normal form
    group_of: dict[str, int] = {}
    for place, key in enumerate(keys):
        group_of.setdefault(key, place)
    # near duplicates join their groups, under the smaller number
    for key, earlier in PromptIndex(prompts, threshold).near_pairs:
        joined = {group_of[key], group_of[earlier]}
        for member, group in group_of.items():
            if group in joined:
                group_of[member] = min(joined)
    return [group_of[key] for key in keys]


class PromptIndex:
    """The distinct prompts of a data set, normalised, in an index that finds exact and near duplicates."""

    def __init__(self, prompts: Iterable[str], threshold: float) -> None:
        self.threshold = threshold
        keys = map(normalised, prompts)
        self.trigrams = {key: _trigrams(key) for key in keys}

    @cached_property
    def n_near(self) -> int:
        """How many prompts have a near duplicate among those before them."""
        later_prompts = {later for later, _ in self.near_pairs}
        return len(later_prompts)

    @property
    def near_pairs(self) -> list[tuple[str, str]]:
        """Pairs of prompts that are near duplicates, the later one first."""
        _, pairs = self._lsh_and_near_pairs
        return pairs

    def likeness(self, others: "PromptIndex") -> dict[str, Likeness | None]:
        """Whether each prompt of another data set is in this one: `exact`, `near` or None."""
        likeness: dict[str, Likeness | None] = dict.fromkeys(others.trigrams)
        if not self.trigrams:
            return likeness
        lsh, _ = self._lsh_and_near_pairs
        for key in others.trigrams:
            if key in self.trigrams:
                likeness[key] = "exact"
            elif self._near(lsh, others, key):
                likeness[key] = "near"
        return likeness

    @cached_property
    def _hashes(self) -> dict[str, MinHash]:
        return {key: _min_hash(trigrams) for key, trigrams in self.trigrams.items()}

    @cached_property
    def _lsh_and_near_pairs(self) -> tuple[MinHashLSH, list[tuple[str, str]]]:
        # the index answers with candidates: below the threshold, so that few pairs at the threshold are missed
        candidate_threshold = max(_LEAST_THRESHOLD, self.threshold - 0.1)
        lsh = MinHashLSH(threshold=candidate_threshold, num_perm=_N_HASHES)
        pairs = []
        for key in self.trigrams:
            # each prompt is looked for before it is inserted: among those before it
            for earlier in self._near(lsh, self, key):
                pairs.append((key, earlier))
            lsh.insert(key, self._hashes[key])
        return lsh, pairs

    def _near(self, lsh: MinHashLSH, others: "PromptIndex", key: str) -> list[str]:
        """The inserted prompts that are near duplicates of the prompt `key` of `others`; candidates are checked."""
        trigrams = others.trigrams[key]
        near = []
        for candidate in map(str, lsh.query(others._hashes[key])):
            similarity = _jaccard(trigrams, self.trigrams[candidate])
            if similarity >= self.threshold:
                near.append(candidate)
        return near


def check_threshold(threshold: float) -> None:
    """Raise `InputError` unless the threshold is in (0, 1]."""
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be in (0, 1], got {threshold}")


def _trigrams(normal: str) -> frozenset[str]:
    """Runs of three words; a shorter text is one run."""
    words = normal.split()
    n_runs = max(1, len(words) - 2)
    return frozenset(" ".join(words[i : i + 3]) for i in range(n_runs))


def _min_hash(trigrams: frozenset[str]) -> MinHash:
    hashes = MinHash(num_perm=_N_HASHES, seed=0)
    hashes.update_batch([trigram.encode() for trigram in trigrams])
    return hashes


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    n_shared = len(first & second)
    return n_shared / len(first | second)
