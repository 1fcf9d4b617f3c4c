"""`dean-interp pages`: a folder of pages of a run's strongest units, linked to each other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import OmitArgPrefixes, Positional

from dean_interp.cli.step_result import StepResult
from dean_interp.report.site import write_pages
from dean_interp.study.site_records import PagesConfig


@dataclass(frozen=True)
class WritePages:
    """Write a page for each of a run's strongest units, linked by the edges between them, and an index with search.

    The folder works without a server. A killed call goes on where it was, and what did not change is not made again.
    """

    run: Positional[Path]
    """Run folder of `run` or `improve`, finished."""
    pages: OmitArgPrefixes[PagesConfig] = field(default_factory=PagesConfig)
    out: Path | None = None
    """Folder of the pages; `index.html` appears in it. Unset: `site` in the run folder."""
    device: Literal["cpu", "cuda", "mps"] | None = None
    """Where the model runs. Unset: CUDA where there is one, else the CPU."""


def do_pages(step: WritePages) -> StepResult:
    """Write the pages. Raises `InputError` for what can be put right."""
    out = step.out or step.run / "site"
    index = write_pages(step.run, out, step.pages, device=step.device)
    units = sorted(path.stem for path in (out / "neurons").glob("*.html"))
    return StepResult({"index": str(index), "units": units}, f"{len(units)} units\npages: {index.resolve()}")
