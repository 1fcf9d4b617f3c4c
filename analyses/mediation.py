"""Do the coupled units carry the trade-off? In a fine-tuned model they alone get their old values back.

    python analyses/mediation.py --out runs/mediation

on the demo model (--model for another), fine-tuned on `--second`. If the coupled units carry what fine-tuning does to
the other behaviour, that comes back when they are restored, while the trained one stays; random units of the same size,
matched by site and stratum, are the control. The other way round, the original model gets the fine-tuned values of the
coupled units alone. Total effect: fine-tuned less original. Indirect, through the units: fine-tuned less restored.
Direct: restored less original. Putting a model's own values into it must change nothing. Resumes; writes results.json,
report.html and a figure.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro
from dean_interp.study.folder import owned
from tyro.conf import OmitArgPrefixes

from dean_interp import Selection, couple, load_model, random_like
from dean_interp.cli.ending import script
from dean_interp.editing.values import Restore
from dean_interp.evaluation.outcomes import Outcome
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.models.load import HookedModel
from dean_interp.models.sites import neuron_sites
from dean_interp.progress import progress_bar
from dean_interp.report.figures import changes_by_arm
from dean_interp.report.html import write_arms_report
from dean_interp.selection.strata import strata
from dean_interp.study.arms import ArmResults, Arms, command, compared, margins
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import score_into

TUNED, ITSELF, EVERY = "fine-tuned", "fine-tuned, its own values put back", "fine-tuned, every MLP neuron restored"


@dataclass(frozen=True)
class Mediation:
    """Fine-tune on second; restore the coupled units; look at both."""

    out: Path = Path("runs/mediation")
    n_controls: int = 19
    """Random sets for each kind of unit."""
    quick: bool = False
    """Four controls."""
    tuning: FineTuningConfig = field(default_factory=FineTuningConfig)
    study: OmitArgPrefixes[StudyConfig] = field(default_factory=lambda: StudyConfig(n_answers=0))


def run(given: Mediation) -> ArmResults:
    """All arms, from their files where they were taken before."""
    config, n_controls = given.study, 4 if given.quick else given.n_controls
    config.check()
    given.tuning.check()
    calibration = config.calibration()
    tests, _ = config.tests(calibration)
    settings = {"study": dataclasses.asdict(config), "tuning": dataclasses.asdict(given.tuning)}
    with owned(given.out, settings, [*calibration, *tests]):
        arms = Arms(config, given.out, tests)
        how = {"device": config.device, "dtype": config.dtype}
        model = load_model(config.model, **how)
        scores = [score_into(given.out, model, one, config) for one in calibration]
        original = arms.take("original", model)
        checkpoint = fine_tune(
            config.model, calibration[1:2], given.tuning, folder=given.out / "tuned", template=config.template, **how
        )
        tuned = load_model(checkpoint, **how)
        taken = {TUNED: arms.take(TUNED, tuned)}
        chosen, controls = {}, {}
        for unit in config.units:
            own = [one.of(unit) for one in scores]
            edit, matched = couple(*own, fraction=config.fraction(unit)).coupled, strata(model, own)
            random = [random_like(edit, matched, seed=config.seed * 1000 + i) for i in range(n_controls)]
            chosen[unit] = edit
            for name, base, other in ((restored(unit), tuned, model), (moved(unit), model, tuned)):
                controls[name] = [
                    arms.take(f"{name}, random {i}", base, one, value=Restore(other))
                    for i, one in enumerate(progress_bar(random, desc=f"random {unit}s", unit="control"))
                ]
                taken[name] = arms.take(name, base, edit, value=Restore(other))  # fmt: skip
        taken[ITSELF] = arms.take(ITSELF, tuned, chosen[config.units[0]], value=Restore(tuned))
        taken[EVERY] = arms.take(EVERY, tuned, every_neuron(model), value=Restore(model))
        results = finished(given, original, taken, controls, chosen, [one.name for one in tests[:2]])
        figure = changes_by_arm(results.margins, "change (nats per token)")
        page = write_arms_report(results, given.out, {"Effects on both margins": figure})
        print(results, f"page: {page.resolve()}", sep="\n\n")
        return results


def restored(unit: str) -> str:
    """The arm in which the fine-tuned model gets the original's units."""
    return f"{TUNED}, coupled {unit}s restored"


def moved(unit: str) -> str:
    """The arm in which the original gets the fine-tuned model's units."""
    return f"original, coupled {unit}s as fine-tuned"


def every_neuron(model: HookedModel) -> Selection:
    """All MLP neurons."""
    return Selection({site: torch.arange(model.cfg.d_mlp) for site in neuron_sites(model)},
                     {site: (model.cfg.d_mlp,) for site in neuron_sites(model)})  # fmt: skip


def finished(
    given: Mediation,
    original: list[Outcome],
    taken: Mapping[str, list[Outcome]],
    controls: Mapping[str, list[list[Outcome]]],
    chosen: Mapping[str, Selection],
    names: list[str],
) -> ArmResults:
    """Restored arms stand against the fine-tuned model, the others against the original."""
    back = {name: some for name, some in taken.items() if name.startswith(f"{TUNED},")}
    lines = compared(original, {name: some for name, some in taken.items() if name not in back}, controls)
    lines |= compared(taken[TUNED], back, controls)
    other, trained = names
    identical = max(abs(line.change.mean) for line in lines[ITSELF])
    total, every = margins(lines[TUNED]), margins(lines[EVERY])
    said = [
        f"Fine-tuning on {trained} changes the {trained} margin by {total[trained].change} and the {other} margin by "
        f"{total[other].change} nats per token (total effects). Its own values put back change it by {identical:g}; "
        f"every MLP neuron restored: {other} {every[other].change}, {trained} {every[trained].change}."
    ]
    for unit, edit in chosen.items():
        for arm, effect in ((restored(unit), "given back"), (moved(unit), "as fine-tuned, in the original model")):
            parts = []
            for name, line in margins(lines[arm]).items():
                beaten = sum(abs(one) >= abs(line.change.mean) for one in line.control_changes)
                parts.append(
                    f"{name} {line.change} (of {len(line.control_changes)} random sets {beaten} move it as much)"
                )
            said.append(f"The {len(edit)} coupled {unit}s {effect}: {'; '.join(parts)}.")
    facts = {
        "indirect effect": "the restored arm with its sign turned (fine-tuned less restored); direct: the rest",
        "dose": f"{given.tuning.method} fine-tuning on {trained}: {given.tuning.n_steps} steps of "
        f"{given.tuning.batch_size} examples of {given.study.n_calibration}",
        "controls": "random sets of the same size, matched by site and stratum; rank is one-sided, for a rise",
        "command": command(),
    }
    title = f"Do the coupled units carry the trade-off in {given.study.model}?"
    named = {name if name not in back else f"{name} (against fine-tuned)": some for name, some in lines.items()}
    return ArmResults(title, given.study.model, facts, tuple(said), named)


if __name__ == "__main__":
    script(lambda: run(tyro.cli(Mediation, description=__doc__)))
