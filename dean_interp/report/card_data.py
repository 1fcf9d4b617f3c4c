"""Which model and which data sets the card of an edit names, and how: so that others find them, and no path is told."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from dean_interp.data.hub_names import is_on_hub
from dean_interp.data.readers import BUILTIN
from dean_interp.data.sources import SOURCES, behaviour_name, licence_of, named_source
from dean_interp.models.demo import DEMO_MODEL, HUB_NAME, LICENCE
from dean_interp.study.improvement import Improvement
from dean_interp.study.results import Results


@dataclass(frozen=True)
class CardSet:
    """A data set, as a card names it."""

    name: str
    origin: str
    """Where it comes from, in words."""
    hub: str | None
    """Its name on the Hugging Face hub, where it comes from there."""
    licence: str
    sizes: Mapping[str, str]
    """How many examples did what."""


def hub_model(name: str) -> str | None:
    """The name of a model on the Hugging Face hub; None where it is not known."""
    # A converted file of the demo model has its version behind its name.
    if re.fullmatch(rf"{DEMO_MODEL}(-[\d.]+)?", name):
        return HUB_NAME
    return name if is_on_hub(name) else None


def shared_command(step: str, words: Sequence[str]) -> str:
    """A command line as others read it: of every path in it the last part."""
    shown = []
    for word in words:
        is_path = _has_folder(word) and os.path.exists(word)
        shown.append(Path(word).name if is_path else word)
    return shlex.join(["dean-interp", step, *shown])


def licence_of_model(name: str) -> str | None:
    """The licence that the card of a model names: in its folder, or in the cache of the hub; None where none does."""
    hub = hub_model(name)
    if hub == HUB_NAME:
        return LICENCE
    card = Path(name) / "README.md"
    if not card.is_file() and hub:
        cached = try_to_load_from_cache(hub, "README.md")
        card = Path(cached) if isinstance(cached, str) else card
    try:
        facts = metadata_load(card) if card.is_file() else None
    # Whoever wrote it: a card that is no card names no licence.
    except (ValueError, yaml.YAMLError):
        return None
    licence = (facts or {}).get("license")
    return licence if isinstance(licence, str) else None


def improvement_sets(improvement: Improvement) -> tuple[CardSet, ...]:
    """The sets of an improvement, with the examples of each role."""
    config = improvement.config
    sets = []
    for source, role in zip(config.data.sources, improvement.roles, strict=True):
        topics = "prompts" if role.divided_by == "prompt" else "topics"
        sizes = {}
        for name, n_examples in role.n_examples.items():
            sizes[name] = f"{n_examples} of {role.n_topics[name]} {topics}"
        sets.append(_card_set(source, sizes))
    if config.register is not None:
        register = behaviour_name(config.register)
        n_confirming = max(line.n for line in improvement.edit.lines if line.on == register)
        sizes = {"confirm": str(n_confirming)}
        sets.append(_card_set(config.register, sizes))
    return tuple(sets)


def study_sets(results: Results) -> tuple[CardSet, ...]:
    """The sets of a study, with the examples that were scored and those that were measured."""
    data = results.config.data
    n_scored = results.config.calibration.n_calibration
    n_tested = {
        data.first: data.n_test,
        data.second: data.n_test,
        data.general: data.n_general_test,
    }
    sets = []
    for source, n in n_tested.items():
        sizes = {"score": str(n_scored), "confirm": str(n)}
        sets.append(_card_set(source, sizes))
    return tuple(sets)


def _card_set(source: str, sizes: Mapping[str, str]) -> CardSet:
    hub, origin = None, "a file of its own"
    asked = named_source(source)
    if source in BUILTIN:
        origin = "built into dean_interp"
    elif asked and asked.name in SOURCES:
        hub = SOURCES[asked.name].hub
        origin = f"{asked} ({hub})"
    elif asked:
        origin = str(asked)
    elif is_on_hub(source):
        hub, origin = source, source
    return CardSet(behaviour_name(source), origin, hub, licence_of(source), sizes)


def _has_folder(word: str) -> bool:
    """Whether a word is a path with a folder in it; on Windows either slash parts them."""
    return "/" in word or os.sep in word
