"""A folder of pages of a run's strongest units: an index with search, a page a unit, and a circuit a prompt.

Pages are linked to each other by files in the folder alone, and load nothing: they work without a server.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from pydantic import TypeAdapter

from dean_interp.circuits.neuron_view import NeuronView
from dean_interp.files import write_text
from dean_interp.report.circuit_page import CircuitPage
from dean_interp.report.html import options_of
from dean_interp.report.look import css_variables
from dean_interp.report.neuron_page import NeuronPage
from dean_interp.report.page import rendered
from dean_interp.report.unit_edges import UnitEdges, circuit_name, edges_of_units, prompt_name
from dean_interp.selection.stability import STABLE_PROBABILITY
from dean_interp.study.run_units import RunUnit
from dean_interp.study.site_records import PagesConfig, SiteRecords, site_records
from dean_interp.study.store import fingerprint_of

INDEX = "index.html"
NEURONS, CIRCUITS = "neurons", "circuits"
"""The folders of the units' pages and of the circuits' pages."""
_MARK = re.compile(r'<meta name="fingerprint" content="(\w+)">')
_N_RAISED = 3
STABLE, UNSTABLE = f"at least {STABLE_PROBABILITY:.0%}", f"below {STABLE_PROBABILITY:.0%}"
"""What the index calls units by how often they are selected when the examples are drawn anew."""


def write_pages(
    run_folder: str | Path,
    out: str | Path,
    config: PagesConfig = PagesConfig(),  # noqa: B008 - frozen
    *,
    device: str | None = None,
) -> Path:
    """Write the pages of a finished run's strongest units into a folder, and return its index.

    What is there already is kept: a killed call goes on where it was, and a unit whose run, model, prompts or settings
    changed gets a new page.

    Args:
        run_folder: that of `run` or `improve`.
        out: the folder of the pages; it is made where it is missing.
        config: how many units and prompts.
        device: where the model runs; None takes CUDA where there is one.

    Raises:
        InputError: as `study.site_records.site_records`.
    """
    run_folder, out = Path(run_folder), Path(out)
    records = site_records(run_folder, out, config, device=device)
    edges = edges_of_units(records)
    unit_pages = _write_units(records, edges, out / NEURONS)
    circuit_pages = _write_circuits(records, out / CIRCUITS)
    _delete_others(out, [*unit_pages, *circuit_pages])
    return _write_index(records, edges, run_folder, out, config)


def _write_units(records: SiteRecords, edges: Mapping[str, UnitEdges], folder: Path) -> list[Path]:
    """Write the page of every unit that has none of the same content; return all of them."""
    units, paths = records.run.units, []
    for i, (unit, view) in enumerate(zip(units, records.views, strict=True)):
        path = folder / f"{unit.name}.html"
        shown = {
            "unit": unit,
            "measured_by": records.run.measured_by,
            "place": i + 1,
            "n_units": len(units),
            "before": units[i - 1].name if i else "",
            "after": units[i + 1].name if i + 1 < len(units) else "",
            "edges_in": edges[unit.name].into,
            "edges_out": edges[unit.name].out,
        }
        fingerprint = _fingerprint("unit.html.j2", shown, view)
        if not _is_made(path, fingerprint):
            page = rendered("unit.html.j2", **NeuronPage(view).values, **shown, fingerprint=fingerprint)
            write_text(path, page)
        paths.append(path)
    return paths


def _write_circuits(records: SiteRecords, folder: Path) -> list[Path]:
    """Write the page of every circuit that has an edge and no page of the same content; return all of them."""
    names = [unit.name for unit in records.run.units]
    links = {name: f"../{NEURONS}/{name}.html" for name in names}
    paths = []
    for record in records.circuits:
        if not record.circuit.edges:
            continue
        path = folder / f"{circuit_name(record)}.html"
        fingerprint = _fingerprint("circuit.html.j2", record, links)
        if not _is_made(path, fingerprint):
            page = CircuitPage(
                record.circuit,
                title=f"The units on test prompt {record.number} of {record.behaviour}",
                text=record.prompt,
                links=links,
                index=f"../{INDEX}",
                fingerprint=fingerprint,
            )
            page.save(path)
        paths.append(path)
    return paths


def _fingerprint(template: str, *shown: object) -> str:
    """A hash of what a page shows, and of how."""
    names = ("page.html.j2", "style.css", "sort.js", "neuron.html.j2", template)
    texts = [css_variables()]
    for name in names:
        texts.append((files("dean_interp.report") / name).read_text(encoding="utf-8"))
    for each in shown:
        texts.append(TypeAdapter(object).dump_json(each).decode())
    return fingerprint_of(*texts)


def _is_made(path: Path, fingerprint: str) -> bool:
    return path.is_file() and _fingerprint_in(path) == fingerprint


def _fingerprint_in(path: Path) -> str:
    """The fingerprint that a page carries; empty in a file that is none of these pages."""
    mark = _MARK.search(path.read_text(encoding="utf-8", errors="replace"))
    return mark[1] if mark else ""


def _delete_others(out: Path, pages: Sequence[Path]) -> None:
    """Delete the pages of units and prompts that are not among these any more; no other file."""
    for folder in (NEURONS, CIRCUITS):
        for path in (out / folder).glob("*.html"):
            if path not in pages and _fingerprint_in(path):
                path.unlink()


def _write_index(
    records: SiteRecords, edges: Mapping[str, UnitEdges], run_folder: Path, out: Path, config: PagesConfig
) -> Path:
    run = records.run
    rows = []
    for unit, view in zip(run.units, records.views, strict=True):
        rows.append(_row(unit, view, edges[unit.name]))
    filters = {
        "layer": ("Layer", sorted({unit.layer for unit in run.units})),
        "gate": ("Gate", _values(row.gate for row in rows)),
        "behaviour": ("Matters more to", _values(unit.behaviour for unit in run.units)),
        "stability": ("Stability", _values(row.stability for row in rows)),
    }
    circuits = []
    for record in records.circuits:
        page = circuit_name(record) if record.circuit.edges else ""
        circuits.append({"page": page, "name": prompt_name(record), "prompt": record.prompt})
    options = options_of(config, PagesConfig())
    page = rendered(
        "site.html.j2",
        title=f"The {len(rows)} strongest units of {run.model.title}",
        run_name=run_folder.name,
        headline=run.headline,
        measured_by=run.measured_by,
        behaviours=run.behaviours,
        rows=rows,
        # One value alone leaves nothing to choose.
        filters={name: (label, values) for name, (label, values) in filters.items() if len(values) > 1},
        has_stability=any(unit.stability is not None for unit in run.units),
        circuits=circuits,
        n_prompts=config.n_prompts,
        command=shlex.join(["dean-interp", "pages", str(run_folder), *options, "--out", str(out)]),
    )
    write_text(out / INDEX, page)
    return out / INDEX


@dataclass(frozen=True)
class IndexRow:
    """A unit as the index shows it, and what its filters look at."""

    unit: RunUnit
    gate: str
    stability: str
    """Empty where the run does not know it."""
    fires_on: str
    raises: tuple[str, ...]
    neighbour: str
    words: str
    """What the search finds the unit by, in small letters."""


def _row(unit: RunUnit, view: NeuronView, edges: UnitEdges) -> IndexRow:
    written = view.written
    tokens = [token for token, _ in (*written.promoted, *written.suppressed)]
    fires_on = max(view.firing, key=lambda name: view.firing[name])
    return IndexRow(
        unit=unit,
        gate=_gate(unit.multiplier),
        stability=_stability(unit.stability),
        fires_on=fires_on,
        raises=tuple(token for token, _ in written.promoted[:_N_RAISED]),
        neighbour=edges.neighbour,
        words=" ".join((unit.name, unit.behaviour, fires_on, *tokens)).lower(),
    )


def _gate(multiplier: float) -> str:
    if multiplier == 0:
        return "silenced"
    return "raised" if multiplier > 1 else "lowered"


def _stability(share: float | None) -> str:
    if share is None:
        return ""
    return STABLE if share >= STABLE_PROBABILITY else UNSTABLE


def _values(labels: Iterable[str]) -> list[str]:
    """The different labels that are not empty, in order."""
    return sorted({label for label in labels if label})
