"""Planted models decide: an estimand says that the mutual information fell where it did, and not where it did not."""

import pytest
import torch
from planted_information import Planted, neurons, planted

from dean_interp import InformationArm, MutualInformationConfig, ablate, measure, mutual_information, random_arm_like
from dean_interp.information.compare import mutual_informations

CONFIGS = [
    MutualInformationConfig("downstream_mi", n_subsamples=12, n_shuffles=99, n_null=49),
    MutualInformationConfig("awareness_mi", n_subsamples=12, n_shuffles=49, n_null=19),
]
N_SEEDS, N_SEEDS_BY_HAND = 6, 20
SEEDS = [
    pytest.param(0, marks=pytest.mark.product),
    *range(1, N_SEEDS),
    *(pytest.param(seed, marks=pytest.mark.long) for seed in range(N_SEEDS, N_SEEDS_BY_HAND)),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def asked(one: Planted, silenced, configs=CONFIGS):
    return mutual_informations(
        one.model, one.behaviours, configs, edit=InformationArm(silenced, one.fairness, one.privacy),
        controls=one.controls, calibration=one.calibration, template="raw",
    )  # fmt: skip


def damage(one: Planted, silenced):
    original = measure(one.model, one.behaviours, template="raw")
    with ablate(one.model, silenced):
        now = measure(one.model, one.behaviours, original=original, template="raw")
    return sum(now[name].mean_kl for name in ("fairness", "privacy"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_each_headline_estimand_says_it_fell_where_it_did_and_not_where_it_did_not(tokenizer, seed):
    one = planted(tokenizer, seed)
    for result in asked(one, one.shared):
        for variant in result.variants:
            layer = next(shift for shift in result.of(variant) if shift.layers == (1,))
            assert result.largest_fall_p[variant] == 0.05, "the smallest p among 19 controls"
            assert layer.high < 0 and layer.change < -0.5 * layer.before.excess
    for result in asked(one, one.private):
        for variant in result.variants:
            layer = next(shift for shift in result.of(variant) if shift.layers == (1,))
            assert result.largest_fall_p[variant] > 0.05
            assert layer.change > -0.15 * layer.before.excess


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [N_SEEDS, pytest.param(N_SEEDS_BY_HAND, marks=pytest.mark.long)])
def test_both_ablations_do_the_same_damage(tokenizer, n_seeds):
    ratios = []
    for seed in range(n_seeds):
        one = planted(tokenizer, seed, n_controls=0)
        ratios.append(damage(one, one.private) / damage(one, one.shared))
    assert 0.5 < sorted(ratios)[len(ratios) // 2] < 2


def test_subset_mi_falls_by_construction_where_downstream_mi_does_not(tokenizer):
    """Neurons in both reads that decouple nothing downstream: their own deletion is all that subset_mi sees."""
    one = planted(tokenizer, 0, n_controls=0)
    overlap = neurons(1, [0, 1, 8, 9])
    edit = InformationArm(overlap, one.fairness | overlap, one.privacy | overlap)
    matched = {site: torch.zeros(shape, dtype=torch.int16) for site, shape in overlap.shapes.items()}
    controls = [random_arm_like(edit, matched, seed=seed) for seed in range(9)]
    options = {
        "first_neurons": edit.first_neurons,
        "second_neurons": edit.second_neurons,
        "ablated": overlap,
        "template": "raw",
    }
    config = MutualInformationConfig("subset_mi", k=3, n_subsamples=8)
    subset = mutual_information(one.model, one.behaviours, **options, config=config, controls=controls).layers[0]
    downstream = mutual_information(one.model, one.behaviours, **options).layers[0]
    assert subset.layers == downstream.layers == (1,)
    assert subset.change < -0.5
    assert downstream.change == 0
    assert all(change < 0 for change in subset.control_changes), "its controls fall by construction too"


def by_stratum(selection, codes):
    """The strata of a selection's units, once a unit, site by site."""
    return {site: sorted(codes[site][units].tolist()) for site, units in selection.units.items()}


def test_an_arm_like_another_has_its_sizes_and_overlap_and_none_of_its_neurons(tokenizer):
    overlap = neurons(1, [3, 4])
    edit = InformationArm(neurons(1, [3]), neurons(1, range(0, 5)), neurons(1, range(3, 11)))
    codes = {site: (torch.arange(shape[0]) % 3).short() for site, shape in overlap.shapes.items()}
    held = edit.first_neurons | edit.second_neurons
    for seed in range(5):
        arm = random_arm_like(edit, codes, seed=seed)
        assert [len(arm.ablated), len(arm.first_neurons), len(arm.second_neurons)] == [1, 5, 8]
        assert len(arm.first_neurons & arm.second_neurons) == 2 and not len(
            arm.ablated - (arm.first_neurons & arm.second_neurons)
        )
        assert not len((arm.first_neurons | arm.second_neurons) & held)
        for name in ("ablated", "first_neurons", "second_neurons"):
            assert by_stratum(getattr(arm, name), codes) == by_stratum(getattr(edit, name), codes)
    assert (
        random_arm_like(edit, codes, seed=0).ablated.fingerprint
        == random_arm_like(edit, codes, seed=0).ablated.fingerprint
    )


def test_a_killed_call_goes_on_to_the_same_numbers(tokenizer, tmp_path, monkeypatch):
    one = planted(tokenizer, 0, n_prompts=20, n_controls=4)
    options = {
        "first_neurons": one.fairness, "second_neurons": one.privacy, "ablated": one.shared, "controls": one.controls,
        "template": "raw", "config": MutualInformationConfig("downstream_mi", k=2, n_subsamples=4),
    }  # fmt: skip
    whole = mutual_information(one.model, one.behaviours, **options)
    n_passes = []

    def counted(*args, **kwargs):
        n_passes.append(1)
        if len(n_passes) == 4:  # the original, two controls, and the kill
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    from dean_interp.information import compare

    read = compare.read_activations
    monkeypatch.setattr(compare, "read_activations", counted)
    with pytest.raises(KeyboardInterrupt):
        mutual_information(one.model, one.behaviours, **options, folder=tmp_path)
    n_passes.clear()
    n_passes += [1] * 10
    resumed = mutual_information(one.model, one.behaviours, **options, folder=tmp_path)
    assert len(n_passes) - 10 == 1 + 2 + 1, "the original, the two controls that were left, the edit"
    assert resumed == whole
    n_passes.clear()
    n_passes += [1] * 10
    mutual_information(one.model, one.behaviours, **options | {"ablated": one.private}, folder=tmp_path)
    assert len(n_passes) - 10 == 1 + 4 + 1, "another edit takes up nothing"


def test_label_information_is_what_the_letters_plant(tokenizer):
    """The last letter of an answer tells its label to every neuron that reads the shared cause, of both kinds."""
    one = planted(tokenizer, 0, n_controls=0)
    config = MutualInformationConfig("label_information", n_subsamples=2, n_shuffles=9)
    (result,) = asked(one, one.shared, [config])
    for variant in result.variants:
        layer = next(shift for shift in result.of(variant) if shift.layers == (1,))
        assert layer.before.value > 0.4 and layer.before.p == 0.1
        assert layer.after.value < 0.3 * layer.before.value
    assert len(result.variants) == 4 and "fairness neurons, privacy label" in result.variants


def test_the_papers_nhsic_of_arbitrary_pairs_equals_its_shuffle_mean(tokenizer):
    z = []
    for seed in range(6):
        one = planted(tokenizer, seed, n_controls=0)
        (result,) = asked(
            one, one.shared, [MutualInformationConfig("paper_nhsic", seed=seed, n_shuffles=99, n_subsamples=2)]
        )
        level = result.layers[1].before
        z.append((level.value - level.null_mean) / level.null_sd)
        assert level.value > 3 * abs(level.excess), "a plausible number that is all null"
    assert abs(sum(z) / len(z)) < 1.3 and max(map(abs, z)) < 3.5
