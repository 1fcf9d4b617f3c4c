"""Does silencing the coupled neurons lower the mutual information between the behaviours? Every estimand and layer.

    python analyses/mutual_information.py --out runs/information

on the demo model (--model for another): an hour on two cores, resumes where it was stopped. 99 random ablations of the
edit's KL to the original are the controls; those of `subset_mi` are other pairs of neuron sets with their overlap
silenced. What an estimate is worth is its rank among the controls. Writes information.json, information.html and one
figure an estimand.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp import (
    Behaviour,
    InformationArm,
    Measurement,
    MutualInformation,
    MutualInformationConfig,
    Scores,
    Selection,
    ablate,
    importance,
    load_behaviour,
    load_model,
    load_scores,
    measure,
    random_arm_like,
    top_fraction,
)
from dean_interp.cli.ending import command, script
from dean_interp.files import write_json, write_text
from dean_interp.information.compare import mutual_informations
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.html import write_information_report
from dean_interp.resume import read_kept
from dean_interp.selection.coupling import couple
from dean_interp.selection.size_at_kl import size_at_kl
from dean_interp.selection.strata import Strata, strata
from dean_interp.study.controls import random_control
from dean_interp.study.method import disjoint_neurons
from dean_interp.study.results import InformationResults

NAMES = ("fairness", "privacy", "general")
INFORMATION_FRACTION, TOP = 0.05, 0.01
"""Top fraction of the neurons between which information is estimated, and of those that are coupled."""
N_SCORED, N_GENERAL, ANSWER_TOKENS = 96, 16, 16
"""Examples that are scored of each behaviour; general test examples and their first tokens, on which KL is taken."""
LARGEST_GROWTH = 40.0
"""The largest size of a control, relative to the edit."""
QUESTIONS = (
    MutualInformationConfig("downstream_mi"),
    MutualInformationConfig("awareness_mi"),
    MutualInformationConfig("downstream_mi", estimator="copula_mi"),
    MutualInformationConfig("downstream_mi", estimator="rbf_cka"),
    MutualInformationConfig("downstream_mi", k=2),
    MutualInformationConfig("downstream_mi", k=3),
    MutualInformationConfig("awareness_mi", estimator="copula_mi"),
    MutualInformationConfig("label_information"),
    MutualInformationConfig("paper_nhsic"),
)


@dataclass(frozen=True)
class EqualKlControls:
    """Random ablations that do as much to general text as the edit."""

    selections: Sequence[Selection]
    kl: Sequence[float]
    """KL of each to the original, nats per token."""
    kl_of_edit: float


def main() -> None:
    """Score, select, find controls, estimate, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--out", type=Path, default=Path("runs/information"))
    parser.add_argument("--n-test", type=int, default=40, help="test prompts of each behaviour")
    parser.add_argument("--n-controls", type=int, default=99)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    model = load_model(given.model)
    scores = scored(model, given.out)
    coupled = couple(*scores, fraction=TOP).coupled
    matched = strata(model, scores)
    controls = equal_kl_controls(
        model=model, edit=coupled, matched=matched, n=given.n_controls, path=given.out / "growths.json"
    )
    informations = estimated(
        given=given, model=model, scores=scores, coupled=coupled, matched=matched, controls=controls
    )
    results = InformationResults(given.model, facts(given, coupled, controls), informations)
    write_json(given.out / "information.json", results)
    page = write_information_report(results, given.out)
    for information in informations:
        print(information, end="\n\n")
    print(f"page: {page.resolve()}")


def scored(model: HookedModel, folder: Path) -> list[Scores]:
    """Neuron scores of the three behaviours, kept in the folder."""
    scores = []
    for name in NAMES:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            importance(model, load_behaviour(name, n_examples=N_SCORED), unit="neuron").save(path)
        scores.append(load_scores(path))
    return scores


def equal_kl_controls(model: HookedModel, edit: Selection, matched: Strata, n: int, path: Path) -> EqualKlControls:
    """The first `n` random ablations of the edit's KL. How far each was grown, and its KL, are kept in a file."""
    general = load_behaviour("general", n_examples=N_GENERAL, split="test")
    original = measure(model, [general], answer_tokens=ANSWER_TOKENS)

    def kl(ablated: Selection) -> float:
        return kl_under(model, ablated, general, original)

    def drawn(number: int, growth: float) -> Selection:
        return random_control(edit, matched, seed=0, number=number, growth=growth)

    target = kl(edit)
    found = read_kept(path, list[tuple[float, float]]) if path.is_file() else []
    for number in progress_bar(range(len(found), n), initial=len(found), total=n, desc="sizes of equal KL"):
        # The search begins at the median of the sizes so far; the first one has further to go.
        start, max_tries = 1.0, 8
        if number:
            start, max_tries = sorted(growth for growth, _ in found)[number // 2], 4
        growth, is_inside = size_at_kl(
            lambda growth, number=number: kl(drawn(number, growth)),
            target,
            bounds=(1 / len(edit), LARGEST_GROWTH),
            start=start,
            max_tries=max_tries,
        )
        found.append((growth, kl(drawn(number, growth))))
        if not is_inside:
            print(f"control {number + 1} has a KL of {found[-1][1]:.4f}, not within 10 % of the edit's {target:.4f}")
        write_text(path, json.dumps(found))
    selections = [drawn(number, growth) for number, (growth, _) in enumerate(found[:n])]
    return EqualKlControls(selections=selections, kl=[kl for _, kl in found[:n]], kl_of_edit=target)


def kl_under(model: HookedModel, ablated: Selection, general: Behaviour, original: Measurement) -> float:
    """KL to the original on general text while units are silenced, nats per token."""
    with ablate(model, ablated):
        measured = measure(model, [general], original=original, answer_tokens=ANSWER_TOKENS)
    return measured[general.name].mean_kl


def estimated(
    given: argparse.Namespace,
    model: HookedModel,
    scores: Sequence[Scores],
    coupled: Selection,
    matched: Strata,
    controls: EqualKlControls,
) -> tuple[MutualInformation, ...]:
    """Every question under the edit, beside its controls."""
    tests = [load_behaviour(name, n_examples=given.n_test, split="test") for name in NAMES[:2]]
    calibration = [load_behaviour(name, n_examples=N_SCORED) for name in NAMES[:2]]
    edit = InformationArm(coupled, *disjoint_neurons(scores, INFORMATION_FRACTION))
    informations = mutual_informations(
        model,
        tests,
        QUESTIONS,
        edit=edit,
        controls=controls.selections,
        calibration=calibration,
        folder=given.out,
    )
    # The paper's own subsets overlap in the coupled neurons: their controls are pairs of subsets, too.
    subsets = [top_fraction(behaviour, INFORMATION_FRACTION) for behaviour in scores[:2]]
    overlapping = InformationArm(coupled, *subsets)
    pairs = [random_arm_like(overlapping, matched, seed=seed) for seed in range(given.n_controls)]
    informations += mutual_informations(
        model,
        tests,
        [MutualInformationConfig("subset_mi")],
        edit=overlapping,
        controls=pairs,
        folder=given.out / "subset",
    )
    return informations


def facts(given: argparse.Namespace, coupled: Selection, controls: EqualKlControls) -> dict[str, str]:
    """How it was done."""
    sizes = [len(selection) for selection in controls.selections]
    return {
        "silenced": f"{len(coupled)} coupled neurons (top {TOP:.0%} of both behaviours, not of general)",
        "KL to the original": f"{controls.kl_of_edit:.4f} nats per token; controls {min(controls.kl):.4f} to "
        f"{max(controls.kl):.4f}",
        "controls": f"{len(sizes)} random sets, {min(sizes)} to {max(sizes)} neurons, matched on layer and norm",
        "test prompts": f"{given.n_test} of each behaviour",
        "command": command(),
    }


if __name__ == "__main__":
    script(main)
