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
    test: Behaviour, calibration: Sequence[Behaviour], *, threshold: float = NEAR
) -> tuple[Behaviour, Leaked]:
    """The test examples whose prompts are no exact or near duplicates of a calibration prompt, and the others' prompts.

    Raises `InputError` where none is left.
    """
    return all_without_leaks([test], calibration, threshold=threshold)[0]


def all_without_leaks(
    tests: Sequence[Behaviour], calibration: Sequence[Behaviour], *, threshold: float = NEAR
) -> list[tuple[Behaviour, Leaked]]:
    """Do the same for several test sets: the calibration prompts are hashed once."""
    check_threshold(threshold)
    index = PromptIndex([prompt for behaviour in calibration for prompt in behaviour.prompts], threshold)
    return [_without(test, index) for test in tests]


def _without(test: Behaviour, calibration: "PromptIndex") -> tuple[Behaviour, Leaked]:
    likeness = calibration.likeness(PromptIndex(test.prompts, calibration.threshold))
    kept = tuple(example for example in test.examples if likeness[normalised(example.prompt)] is None)
    if not kept:
        raise InputError(f"every test prompt of '{test.name}' is among the calibration prompts: give other test data")
    prompts = list(dict.fromkeys(test.prompts))
    leaked = Leaked(
        name=test.name,
        n_prompts=len(prompts),
        exact=tuple(prompt for prompt in prompts if likeness[normalised(prompt)] == "exact"),
        near=tuple(prompt for prompt in prompts if likeness[normalised(prompt)] == "near"),
    )
    return dataclasses.replace(test, examples=kept), leaked


def near_groups(prompts: Sequence[str], *, threshold: float = NEAR) -> list[int]:
    """The group of each prompt, by number: near duplicates are in one group, and their near duplicates with them.

    A group's number is the place of its first prompt.
    """
    check_threshold(threshold)
    keys = [normalised(prompt) for prompt in prompts]
    index = PromptIndex(prompts, threshold)
    group_of: dict[str, str] = {key: key for key in index.trigrams}
    for key, earlier in index.near_pairs:
        # Both groups become the one of the earlier prompt.
        old, new = group_of[key], group_of[earlier]
        group_of = {member: new if group == old else group for member, group in group_of.items()}
    first_place = {key: place for place, key in reversed(list(enumerate(keys)))}
    smallest: dict[str, int] = {}
    for key, group in group_of.items():
        smallest[group] = min(first_place[key], smallest.get(group, len(keys)))
    return [smallest[group_of[key]] for key in keys]


class PromptIndex:
    """The distinct prompts of a data set, normalised, in an index that finds exact and near duplicates."""

    def __init__(self, prompts: Iterable[str], threshold: float) -> None:
        self.threshold = threshold
        self.trigrams = {key: _trigrams(key) for key in map(normalised, prompts)}

    @cached_property
    def n_near(self) -> int:
        """How many prompts have a near duplicate among those before them."""
        return len({later for later, _ in self.near_pairs})

    @property
    def near_pairs(self) -> list[tuple[str, str]]:
        """Pairs of prompts that are near duplicates, the later one first."""
        return self._lsh_and_near_pairs[1]

    def likeness(self, others: "PromptIndex") -> dict[str, Likeness | None]:
        """Whether each prompt of another data set is in this one: `exact`, `near` or None."""
        result: dict[str, Likeness | None] = dict.fromkeys(others.trigrams)
        if not self.trigrams:
            return result
        lsh, _ = self._lsh_and_near_pairs
        for key in others.trigrams:
            if key in self.trigrams:
                result[key] = "exact"
            elif self._near(lsh, others, key):
                result[key] = "near"
        return result

    @cached_property
    def _hashes(self) -> dict[str, MinHash]:
        return {key: _min_hash(trigrams) for key, trigrams in self.trigrams.items()}

    @cached_property
    def _lsh_and_near_pairs(self) -> tuple[MinHashLSH, list[tuple[str, str]]]:
        # the index answers with candidates: below the threshold, so that few pairs at the threshold are missed
        lsh = MinHashLSH(threshold=max(0.05, self.threshold - 0.1), num_perm=_N_HASHES)
        pairs = []
        for key in self.trigrams:
            # each prompt is looked for before it is inserted: among those before it
            pairs += [(key, earlier) for earlier in self._near(lsh, self, key)]
            lsh.insert(key, self._hashes[key])
        return lsh, pairs

    def _near(self, lsh: MinHashLSH, others: "PromptIndex", key: str) -> list[str]:
        """The inserted prompts that are near duplicates of the prompt `key` of `others`; candidates are checked."""
        candidates = map(str, lsh.query(others._hashes[key]))
        trigrams = others.trigrams[key]
        return [each for each in candidates if _jaccard(trigrams, self.trigrams[each]) >= self.threshold]


def check_threshold(threshold: float) -> None:
    """Raise `InputError` unless the threshold is in (0, 1]."""
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must be in (0, 1], got {threshold}")


def _trigrams(normal: str) -> frozenset[str]:
    """Runs of three words; a shorter text is one run."""
    words = normal.split()
    return frozenset(" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2)))


def _min_hash(trigrams: frozenset[str]) -> MinHash:
    hashes = MinHash(num_perm=_N_HASHES, seed=0)
    hashes.update_batch([trigram.encode() for trigram in trigrams])
    return hashes


def _jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    return len(first & second) / len(first | second)
