"""Does silencing the coupled neurons lower the mutual information between the behaviours? Every estimand and layer.

    python analyses/mutual_information.py --out runs/information

on the demo model (--model for another): an hour on two cores, resumes where it was stopped. 99 random ablations of the
edit's KL to the original are the controls; those of `subset_mi` are other pairs of sets with their overlap silenced.
Writes information.json, information.html and one figure an estimand.
"""

import argparse
import json
import sys
from pathlib import Path

from dean_interp.study.states import disjoint_neurons

from dean_interp import (
    Arm,
    Behaviour,
    Measurement,
    MutualInformationConfig,
    Scores,
    Selection,
    ablate,
    couple,
    importance,
    load_behaviour,
    load_model,
    load_scores,
    measure,
    random_arm_like,
    random_like,
    top_fraction,
)
from dean_interp.cli.ending import script
from dean_interp.files import write_text
from dean_interp.information.compare import mutual_informations
from dean_interp.models.demo import DEMO_MODEL
from dean_interp.models.load import HookedModel
from dean_interp.progress import progress_bar
from dean_interp.report.html import write_information_report
from dean_interp.selection.strata import Strata, strata
from dean_interp.study.controls import grow_to_kl
from dean_interp.study.results import InformationResults, save_record

NAMES = ("fairness", "privacy", "general")
READS, TOP = 0.05, 0.01
CONFIGS = (
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


def scored(model: HookedModel, folder: Path) -> list[Scores]:
    """Neuron scores of the three behaviours, kept in the folder."""
    found = []
    for name in NAMES:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            importance(model, load_behaviour(name, n_examples=96), unit="neuron").save(path)
        found.append(load_scores(path))
    return found


class EqualKl:
    """Random ablations grown until they do as much to general text as the edit; growths are kept in the folder."""

    def __init__(self, model: HookedModel, edit: Selection, matched: Strata, general: Behaviour, folder: Path) -> None:
        self.model, self.edit, self.matched, self.general = model, edit, matched, general
        self.path = folder / "growths.json"
        self.original: Measurement = measure(model, [general], answer_tokens=16)
        self.target = self.kl(edit)
        self.growths: list[tuple[float, float]] = json.loads(self.path.read_text()) if self.path.is_file() else []

    def kl(self, ablated: Selection) -> float:
        """KL to the original on general text, nats per token."""
        with ablate(self.model, ablated):
            now = measure(self.model, [self.general], original=self.original, answer_tokens=16)
        return now[self.general.name].mean_kl

    def drawn(self, seed: int, growth: float) -> Selection:
        """One draw at one size."""
        return random_like(self.edit, self.matched, seed=seed, growth=growth)

    def controls(self, n: int) -> list[Selection]:
        """The first `n` controls."""
        for seed in progress_bar(
            range(len(self.growths), n), initial=len(self.growths), total=n, desc="sizes of equal KL"
        ):
            start = sorted(growth for growth, _ in self.growths)[seed // 2] if seed else 1.0
            growth, _ = grow_to_kl(
                lambda growth, seed=seed: self.drawn(seed, growth), self.kl, self.target,
                bounds=(1 / len(self.edit), 40.0), start=start, max_tries=4 if seed else 8,
            )  # fmt: skip
            self.growths.append((growth, self.kl(self.drawn(seed, growth))))
            write_text(self.path, json.dumps(self.growths))
        return [self.drawn(seed, growth) for seed, (growth, _) in enumerate(self.growths[:n])]


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
    tests = [load_behaviour(name, n_examples=given.n_test, split="test") for name in NAMES[:2]]
    calibration = [load_behaviour(name, n_examples=96) for name in NAMES[:2]]
    equal = EqualKl(model, coupled, matched, load_behaviour("general", n_examples=16, split="test"), given.out)
    controls = equal.controls(given.n_controls)
    edit = Arm(coupled, *disjoint_neurons(scores, READS))
    found = mutual_informations(
        model, tests, CONFIGS, edit=edit, controls=controls, calibration=calibration, folder=given.out
    )
    whole = Arm(coupled, top_fraction(scores[0], READS), top_fraction(scores[1], READS))
    pairs = [random_arm_like(whole, matched, seed=seed) for seed in range(given.n_controls)]
    found += mutual_informations(
        model, tests, [MutualInformationConfig("subset_mi")], edit=whole, controls=pairs, folder=given.out / "subset"
    )
    sizes = [len(one) for one in controls]
    kls = [kl for _, kl in equal.growths[: given.n_controls]]
    facts = {
        "silenced": f"{len(coupled)} coupled neurons (top {TOP:.0%} of both behaviours, not of general)",
        "KL to the original": f"{equal.target:.4f} nats per token; controls {min(kls):.4f} to {max(kls):.4f}",
        "controls": f"{len(controls)} random sets, {min(sizes)} to {max(sizes)} neurons, matched on layer and norm",
        "test prompts": f"{given.n_test} of each behaviour",
        "command": f"python analyses/mutual_information.py {' '.join(sys.argv[1:])}",
    }
    results = InformationResults(given.model, facts, found)
    save_record(results, given.out / "information.json")
    page = write_information_report(results, given.out)
    for one in found:
        print(one, end="\n\n")
    print(f"page: {page.resolve()}")


if __name__ == "__main__":
    script(main)
