"""What doses of nulls cost, in passes of the model; how they are found from one measurement."""

import pytest
import torch

from dean_interp import InputError, load_behaviour
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.sites import Site
from dean_interp.models.sizes import site_shape
from dean_interp.selection.gates import Gates
from dean_interp.statistics import Interval
from dean_interp.study.dosing import dose_to_kl, kl_meter, largest_dose
from dean_interp.study.settings import DataConfig
from dean_interp.study.store import Store

pytestmark = pytest.mark.hooks


def test_a_null_costs_one_pass_over_general_text_and_the_original_is_measured_once(llama, tmp_path):
    sets = [load_behaviour(name, n_examples=3, split="test") for name in ("fairness", "privacy", "general")]
    store = Store(folder=tmp_path, fingerprint="x", tests=sets, config=DataConfig(), template="chat")
    directions = []
    for factor in (1.1, 1.2, 1.3):
        multipliers = {site: torch.full(site_shape(llama, site), factor) for site in neuron_sites(llama)}
        directions.append(Gates(multipliers, frozenset()))
    passes = []
    with llama.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda residual, hook: passes.append(hook.name))]):
        kl_meter(store, llama)
        n_of_original = len(passes)
        meter = kl_meter(store, llama)
        assert n_of_original and len(passes) == n_of_original, "the original is measured once"
        for number, direction in enumerate(directions, 1):
            dose_to_kl(direction, meter, kl=0.01, start=1.0)
            assert len(passes) == n_of_original + number, "one batch, one pass a null"


@pytest.mark.parametrize(("breaks_above", "tried"), [(9.0, [1.0]), (0.3, [1.0, 0.5, 0.25])])
def test_a_dose_that_breaks_the_model_is_halved_before_one_is_predicted(breaks_above, tried):
    """KL is the square of the dose here, so the dose of KL 0.04 is 0.2 from wherever it is measured."""
    site = Site(0, "neurons")
    direction, doses = Gates({site: torch.full((4,), 1.5)}, frozenset()), []

    def meter(gates: Gates) -> Interval:
        (change,) = gates.changes[site].unique().tolist()
        doses.append(change / 0.5)
        kl = float("nan") if doses[-1] > breaks_above else doses[-1] ** 2
        return Interval(kl, kl, kl, 3)

    found = dose_to_kl(direction, meter, kl=0.04, start=1.0)
    assert doses == pytest.approx(tried) and found.dose == pytest.approx(0.2)
    assert found.kl.mean == pytest.approx(0.04)


@pytest.mark.parametrize(("kl", "said"), [(0.004, "Give at most 0.0045$"), (-0.001, "No other budget can be reached$")])
def test_a_budget_that_no_gate_reaches_is_answered_with_one_that_is_allowed(kl, said):
    direction = Gates({Site(0, "neurons"): torch.full((4,), 1.5)}, frozenset())
    with pytest.raises(InputError, match=said):
        largest_dose(direction, lambda gates: Interval(kl, kl - 0.0005, kl + 0.0005, 3), max_kl=0.05)
