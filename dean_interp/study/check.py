"""One check of a run: what it holds and what is found now are the same, differ by no more than float noise, or differ.

Numbers may differ by what other batches, threads and devices change; all else must be equal. The checks here are those
that runs of every kind have.
"""

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from dean_interp.data.examples import Behaviour, data_fingerprints
from dean_interp.errors import InputError
from dean_interp.files import link_or_copy, read_json
from dean_interp.frames import Framed
from dean_interp.models.load import versions
from dean_interp.study.results import RESULTS_FILE
from dean_interp.study.run_folder import CHECKSUMS, checksums, kept_files

_TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
"""Nats, and parts of the largest score: what other batches, threads and devices may change."""

Match = Literal["same", "within float noise", "different"]


@dataclass(frozen=True)
class Check:
    """One thing that was compared."""

    what: str
    match: Match
    difference: float
    """The largest; 0 for what is equal or has no size."""
    detail: str = ""


@dataclass(frozen=True)
class Verification(Framed):
    """What holds of a run, and what does not."""

    checks: tuple[Check, ...]
    versions: str
    """Packages that differ from those of the run; empty where none does."""

    @property
    def holds(self) -> bool:
        """Whether nothing is different beyond float noise."""
        return all(check.match != "different" for check in self.checks)

    def to_pandas(self) -> pd.DataFrame:
        """One row a check."""
        return pd.DataFrame([asdict(check) for check in self.checks])

    def __repr__(self) -> str:
        outcome = "holds" if self.holds else "does not hold"
        return f"Verification({outcome}, {len(self.checks)} checks)"

    def __str__(self) -> str:
        lines = []
        for check in self.checks:
            line = f"{check.what:<44} {check.match:<18} {check.difference:<9.2g} {check.detail}"
            lines.append(line.rstrip())
        if self.versions:
            lines.append(f"other versions: {self.versions}")
        n_different = sum(check.match == "different" for check in self.checks)
        if n_different:
            lines.append(f"{n_different} of {len(self.checks)} checks do not hold")
        else:
            lines.append("the run is what it says")
        return "\n".join(lines)


def equal(what: str, now: object, then: object) -> Check:
    """Check that two things are equal."""
    if now == then:
        return Check(what, "same", 0.0)
    return Check(what, "different", 0.0, f"{then} there, {now} now")


def close(what: str, now: Tensor, then: Tensor, *, dtype: str, detail: str) -> Check:
    """Check that two tensors differ by no more than float noise of a model of that dtype."""
    if now.shape != then.shape:
        return Check(what, "different", 0.0, f"{tuple(then.shape)} there, {tuple(now.shape)} now")
    difference = 0.0
    if now.numel():
        difference = float((now.double() - then.double()).abs().max())
    return Check(what, match_of(difference, dtype), difference, detail)


def largest_apart(what: str, pairs: Sequence[tuple[Tensor, Tensor]], *, dtype: str, detail: str) -> Check:
    """Check that tensors, now and then, differ by no more than float noise, in parts of the largest of each pair."""
    largest = 0.0
    for now, then in pairs:
        if now.shape != then.shape:
            return Check(what, "different", math.inf, "of another shape")
        scale = then.abs().max().clamp(min=1e-30)
        apart = float((now - then).abs().max() / scale)
        # `max` would pass over it.
        if math.isnan(apart):
            return Check(what, "different", math.inf, "not all of them are numbers")
        largest = max(largest, apart)
    return Check(what, match_of(largest, dtype), largest, f"{detail}, parts of the largest of each site")


def match_of(difference: float, dtype: str) -> Match:
    """What the largest difference of numbers says, in a model of that dtype."""
    if not difference:
        return "same"
    if difference <= _TOLERANCE[dtype]:
        return "within float noise"
    return "different"


def largest_difference(then: Any, now: Any) -> float:  # noqa: ANN401 - what JSON can hold
    """The largest difference of numbers; infinite where anything else differs."""
    match then, now:
        case dict(), dict() if then.keys() == now.keys():
            differences = [largest_difference(then[key], now[key]) for key in then]
            return max(differences, default=0.0)
        case list(), list() if len(then) == len(now):
            differences = map(largest_difference, then, now)
            return max(differences, default=0.0)
        case int() | float(), int() | float():
            return abs(now - then) / max(1.0, abs(then))
        case _:
            return 0.0 if then == now else math.inf


def check_files(folder: Path) -> Check:
    """The files as `checksums.json` noted them when the run ended."""
    try:
        noted = read_json(folder / CHECKSUMS, dict[str, str])
    except InputError:
        return Check("files", "different", 0.0, f"no {CHECKSUMS}, or none that can be read")
    there = noted.keys() & {*kept_files(folder)}
    now = checksums(folder, there)
    changed = sorted(name for name in noted if noted[name] != now.get(name))
    if changed:
        detail = f"changed since the run: {', '.join(changed[:4])}"
        return Check("files", "different", float(len(changed)), detail)
    return Check("files", "same", 0.0, f"{len(noted)} files")


def check_data(stored: Mapping[str, str], data: Sequence[Behaviour]) -> Iterator[Check]:
    """Every set of examples, by its fingerprint."""
    for name, fingerprint in data_fingerprints(data).items():
        yield equal(f"data: {name}", fingerprint, stored.get(name))


def check_results(folder: Path, again: Callable[[Path], None], *, dtype: str) -> Check:
    """`results.json` anew, in a folder of links to the kept files.

    Args:
        again: writes the results into such a folder.
    """
    what = "results, from the kept files"
    with tempfile.TemporaryDirectory() as name:
        links = Path(name) / folder.resolve().name
        for file in kept_files(folder):
            link = links / file
            link.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(link, (folder / file).resolve())
        path = links / RESULTS_FILE
        path.unlink()
        try:
            again(links)
        except InputError as error:
            # A kept file is of another state.
            return Check(what, "different", math.inf, str(error))
        now = json.loads(path.read_bytes())
    then = json.loads((folder / RESULTS_FILE).read_bytes())
    apart = largest_difference(then, now)
    detail = "numbers, parts of the larger of 1 and what was stored"
    return Check(what, match_of(apart, dtype), apart, detail)


def other_versions(then: Mapping[str, str]) -> str:
    """The packages whose versions are not those of the run, in words."""
    differences = []
    for name, now in versions().items():
        if then.get(name) != now:
            differences.append(f"{name} {then.get(name)} there, {now} here")
    return ", ".join(differences)
