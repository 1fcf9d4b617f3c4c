"""How few examples does DEAN need? A selection from 4 to 512 examples a behaviour, beside random units each time.

    python analyses/limited_data.py --out runs/limited

on the demo model (--model for another; the built-in sets hold 168 examples, the paper's CSVs more). Each size is a draw
that holds the smaller ones. Resumes where it was stopped. Writes results.json, report.html and a figure. The paper
claims that few examples are enough.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from dean_interp.study.folder import owned
from matplotlib.figure import Figure
from tyro.conf import OmitArgPrefixes

from dean_interp import Behaviour, InputError, Selection, couple, load_behaviour, load_model, random_like
from dean_interp.cli.ending import script
from dean_interp.data.examples import draw
from dean_interp.evaluation.outcomes import Outcome
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_along
from dean_interp.report.html import write_arms_report
from dean_interp.selection.stability import jaccard
from dean_interp.selection.strata import strata
from dean_interp.study.arms import MARGIN, ArmResults, Arms, command, compared, margins
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import score_into


@dataclass(frozen=True)
class Limited:
    """One selection a size."""

    out: Path = Path("runs/limited")
    sizes: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    """Examples of each behaviour; those that the data do not hold are left out."""
    n_controls: int = 5
    """Random sets a size and unit."""
    quick: bool = False
    """Every other size, two controls."""
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(n_answers=0))


def run(given: Limited) -> ArmResults:
    """Every size, from its files where it was taken before."""
    config, n_controls = given.study, 2 if given.quick else given.n_controls
    config.check()
    whole = [load_behaviour(source, n_examples=None, response=config.response) for source in config.sources]
    most = min(map(len, whole))
    sizes = [n for n in given.sizes if n <= most][:: -2 if given.quick else -1][::-1]
    if not sizes:
        raise InputError(f"sizes must be at most {most}, what the smallest behaviour holds, got {given.sizes}")
    tests, _ = config.tests(whole)
    settings = {"study": dataclasses.asdict(config), "sizes": sizes, "n_controls": n_controls}
    with owned(given.out, settings, [*whole, *tests]):
        arms = Arms(config, given.out, tests)
        model = load_model(config.model, device=config.device, dtype=config.dtype)
        original, taken, controls, chosen = arms.take("original", model), {}, {}, {}
        for n in progress_bar(sizes, desc="sizes", unit="size"):
            for unit, edit, random in selected(given, model, whole, n, n_controls):
                name = f"{unit}s, {n} examples"
                chosen[name] = edit
                controls[name] = [arms.take(f"{name}, random {i}", model, one) for i, one in enumerate(random)]
                taken[name] = arms.take(name, model, edit)
        results = finished(given, original, taken, controls, chosen, tests)
        figure = along(results, sizes, config, tests)
        page = write_arms_report(results, given.out, {"Margins by number of examples": figure})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def selected(
    given: Limited, model: HookedModel, whole: list[Behaviour], n: int, n_controls: int
) -> list[tuple[str, Selection, list[Selection]]]:
    """Unit, coupled selection and random ones from `n` examples; a size at which nothing is coupled is left out."""
    config, folder, found = given.study, given.out / f"{n}_examples", []
    folder.mkdir(exist_ok=True)
    scores = [score_into(folder, model, draw(one, n, seed=config.seed), config) for one in whole]
    for unit in config.units:
        own = [one.of(unit) for one in scores]
        edit = couple(*own, fraction=config.fraction(unit)).coupled
        if len(edit):
            matched = strata(model, own)
            found.append((unit, edit, [random_like(edit, matched, seed=seed) for seed in range(n_controls)]))
    return found


def finished(
    given: Limited,
    original: list[Outcome],
    taken: dict[str, list[Outcome]],
    controls: dict[str, list[list[Outcome]]],
    chosen: dict[str, Selection],
    tests: list[Behaviour],
) -> ArmResults:
    """The record: what each size changes, and how far its selection is that of the largest."""
    lines, said = compared(original, taken, controls), []
    for unit in given.study.units:
        own = {name: one for name, one in chosen.items() if name.startswith(unit)}
        if not own:
            continue
        largest = list(own)[-1]
        alike = ", ".join(f"{name.split(', ')[1]} {jaccard(one, own[largest]):.2f}" for name, one in own.items())
        moved = {name.split(", ")[1]: margins(lines[name]).values() for name in own}
        rise = [size for size, both in moved.items() if all(line.change.low > 0 for line in both)]
        beat = [size for size, both in moved.items()
                if all(line.change.mean > max(line.control_changes) for line in both)]  # fmt: skip
        said.append(
            f"{unit.capitalize()}s: both margins rise beyond their intervals with {', '.join(rise) or 'no size'}; "
            f"beyond all {len(controls[largest])} random controls with {', '.join(beat) or 'no size'}. Jaccard overlap "
            f"with the selection from {largest.split(', ')[1]}: {alike}."
        )
    facts = {
        "units silenced": "; ".join(f"{name}: {len(one)}" for name, one in chosen.items()),
        "test prompts": f"{len(tests[0])} of each behaviour",
        "command": command(),
    }
    title = f"How few examples does DEAN need in {given.study.model}?"
    return ArmResults(title, given.study.model, facts, tuple(said), lines)


def along(results: ArmResults, sizes: list[int], config: StudyConfig, tests: list[Behaviour]) -> Figure:
    """Both margins by size, on a scale of doublings."""
    panels = {
        f"{one.name} margin": {
            f"coupled {unit}s": [
                (float(i), results.change(f"{unit}s, {n} examples", MARGIN, one.name).change)
                for i, n in enumerate(sizes) if f"{unit}s, {n} examples" in results.arms
            ] for unit in config.units
        } for one in tests[:2]
    }  # fmt: skip
    figure = changes_along(panels, "examples of each behaviour", "change of the margin (nats per token)")
    for axes in figure.axes:
        axes.set_xticks(range(len(sizes)), map(str, sizes))
    return figure


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Limited, description=__doc__)))
