"""The examples of `improve` by role, the prompts that are answered, and who opened the confirming prompts before."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from filelock import FileLock

from dean_interp.data.examples import Behaviour, prompt_hashes_of
from dean_interp.errors import InputError
from dean_interp.evaluation.outcomes import clusters_of
from dean_interp.files import read_json, write_json
from dean_interp.information.activations import distinct
from dean_interp.information.estimands import HEADLINES, MutualInformationConfig, refuse_few
from dean_interp.selection.iterated import refuse_few_topics
from dean_interp.study.improvement import EarlierConfirmation, ImproveConfig
from dean_interp.study.roles import Roles, RoleSizes, drawn_evenly, halves_of, refuse_shared, roles_of
from dean_interp.study.study_data import PromptSets, prompt_sets

log = logging.getLogger(__name__)
CONFIRMATIONS = "confirmations.json"
"""Beside the run folders: the confirming prompts that each opened, by hash."""
EARLIER = "earlier.json"
"""In the run folder: the runs that had opened some of them before."""


@dataclass(frozen=True)
class ImproveData:
    """The examples of every role."""

    first: Roles
    second: Roles
    general: Roles
    register: Behaviour | None
    register_scored: Behaviour | None
    """Its calibration half, where its gains are subtracted."""
    prompts: PromptSets
    """What the original and the edit answer: confirming prompts, and harmless ones that look harmful."""

    @property
    def roles(self) -> tuple[Roles, Roles, Roles]:
        """The roles of first, second and general."""
        return self.first, self.second, self.general

    @property
    def scoring(self) -> list[Behaviour]:
        """First, second and general, to score; and the register set, where its gains are subtracted."""
        parts = [roles.score for roles in self.roles]
        if self.register_scored:
            parts.append(self.register_scored)
        return parts

    @property
    def choosing(self) -> list[Behaviour]:
        """First, second and general, to choose the dose on."""
        return [roles.choose for roles in self.roles]

    @property
    def confirming(self) -> list[Behaviour]:
        """First, second and general, to confirm the edit on."""
        return [roles.confirm for roles in self.roles]

    @property
    def others(self) -> list[Behaviour]:
        """The register set, where there is one."""
        return [self.register] if self.register else []

    @property
    def all(self) -> list[Behaviour]:
        """Every set."""
        return [*self.scoring, *self.choosing, *self.confirming, *self.others, *self.prompts.all]


def improve_data(config: ImproveConfig) -> ImproveData:
    """The examples by role.

    Raises `InputError` as `roles_of`, `refuse_shared` and `prompt_sets`, for a register set without pairs, too few
    topics for the folds, and too few confirming prompts for the mutual information that the paper's rule asks for.
    """
    sizes = RoleSizes(score=config.n_score, choose=config.n_choose, confirm=config.n_confirm)
    first = roles_of(config.first, sizes, seed=config.seed)
    second = roles_of(config.second, sizes, seed=config.seed)
    general = roles_of(config.general, sizes, seed=config.seed, paired=False)
    register = register_scored = None
    if config.register is not None:
        register_scored, register = halves_of(config.register)
        if not register.paired:
            raise InputError(
                f"'{register.name}' is no register set: each of its prompts needs two harmless answers, in the columns "
                "prompt,safe,unsafe"
            )
    if not config.gating.against_register:
        register_scored = None
    data = ImproveData(
        first=first,
        second=second,
        general=general,
        register=register,
        register_scored=register_scored,
        prompts=PromptSets(),
    )
    # Both halves of the register set: the one that is scored must not be measured as another set's.
    halves = [half for half in (register_scored, register) if half]
    refuse_shared(data.roles, [_joined(halves)] if halves else [])
    for roles in (first, second):
        n_topics = len(set(clusters_of(roles.score)))
        # Flips leave one topic out where their number is odd.
        refuse_few_topics(roles.score.name, n_topics - n_topics % 2, config.gating)
    if config.paper_rule:
        confirming = data.confirming[:2]
        groups = [name for name, _ in distinct(confirming)]
        for estimand in HEADLINES:
            refuse_few(MutualInformationConfig(estimand), groups, [behaviour.name for behaviour in confirming])
    return replace(data, prompts=_prompts(config, data))


def _joined(halves: Sequence[Behaviour]) -> Behaviour:
    """The halves of one data set as one."""
    examples = chain.from_iterable(half.examples for half in halves)
    return replace(halves[0], examples=tuple(examples))


def _prompts(config: ImproveConfig, data: ImproveData) -> PromptSets:
    """The prompts to answer. None of them scored or chose, and none is nearly one that did."""
    n_answers = config.answers.n_answers
    if not n_answers:
        return PromptSets()
    seen = [*data.scoring, *data.choosing]
    hashes = prompt_hashes_of(seen)
    asked = prompt_sets(config.data, config.answers, scored=hashes, calibration=seen)
    first, second, general = [drawn_evenly(part, n_answers, seed=config.seed) for part in data.confirming]
    harmful = asked.harmful if config.answers.harmful else (first, second)
    return replace(asked, harmful=harmful, general=(general,))


def earlier_confirmations(folder: Path, data: ImproveData) -> tuple[EarlierConfirmation, ...]:
    """Runs beside this one that opened some of the same confirming prompts; and note that this one opens them.

    What was found is kept in the run folder, so that a killed run says the same when it goes on. A run whose folder was
    emptied since, and that had this folder's name, is an earlier one.
    """
    folder = folder.resolve()
    path = folder.parent / CONFIRMATIONS
    kept = folder / EARLIER
    confirming = data.confirming[:2]
    # Runs side by side read and write it in turn, so that none loses what another noted.
    with FileLock(path.with_suffix(".lock")):
        opened = read_json(path, dict[str, list[str]]) if path.is_file() else {}
        if not kept.is_file():
            write_json(kept, _sharing(opened, confirming))
        # What this folder opens now stands beside what it opened before.
        before = set(opened.get(folder.name, ()))
        now = prompt_hashes_of(confirming)
        if not now <= before:
            opened[folder.name] = sorted(before | now)
            write_json(path, opened)
            log.info("%s: remembers that these confirming prompts were opened, for runs to come", path)
    return tuple(read_json(kept, list[EarlierConfirmation]))


def _sharing(opened: Mapping[str, Sequence[str]], confirming: Sequence[Behaviour]) -> list[EarlierConfirmation]:
    """The runs that opened some of these prompts, by the hashes that each opened."""
    earlier = []
    for name, hashes in opened.items():
        n_shared = sum(len(behaviour.prompts_among(set(hashes))) for behaviour in confirming)
        if n_shared:
            earlier.append(EarlierConfirmation(name, n_shared))
    return earlier
