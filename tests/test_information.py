import pytest
import torch
from hooked import as_hooked_transformer
from units import some_neurons

from dean_interp import Behaviour, Example, InputError, Selection, Site, gated, load_model, mutual_information
from dean_interp.editing.apply import apply_edit, create_gates_edit, revert_edit
from dean_interp.information.activations import Activations, read_activations
from dean_interp.information.before_after import BeforeAfter
from dean_interp.information.estimands import InformationArm, MutualInformationConfig
from dean_interp.information.kept_controls import kept_controls
from dean_interp.models.matrices import neuron_sites
from dean_interp.selection.gates import Gates

pytestmark = pytest.mark.usefixtures("one_thread")
SITE = Site(0, "neurons")
N, D = 240, 12


def units_of(*indices, size=D):
    return Selection({SITE: torch.tensor(indices)}, {SITE: (size,)})


FIRST, SECOND, EVERY = units_of(*range(6)), units_of(*range(6, 12)), units_of(*range(12))


def reads_from(values):
    n = len(values)
    groups = ("fairness",) * (n // 2) + ("privacy",) * (n - n // 2)
    return Activations({SITE: values}, EVERY, groups, tuple(map(str, range(n))))


def drawn(shared, seed=0):
    """Two blocks of six neurons that share one hidden cause with the given weight."""
    generator = torch.Generator().manual_seed(seed)
    cause = torch.randn(N, 1, generator=generator)
    return shared * cause + torch.randn(N, D, generator=generator)


def estimate(before, after, ablated=None, n_shuffles=999, **options):
    arm = InformationArm(ablated or units_of(0, 6), FIRST, SECOND)
    config = MutualInformationConfig(k=5, n_shuffles=n_shuffles, n_subsamples=20, **options)
    estimand = BeforeAfter(config, reads_from(before), arm, ("fairness", "privacy"))
    return estimand.information(reads_from(after), []).layers[0]


def test_it_falls_where_the_ablation_takes_the_shared_cause_away():
    layer = estimate(drawn(1.0), drawn(0.0))
    assert layer.before.p == 0.001 and layer.before.value > layer.before.null_mean + 0.3
    assert layer.after.p > 0.05
    assert layer.change == pytest.approx(-layer.before.excess, abs=0.15)


def test_it_stays_where_the_ablation_changes_nothing():
    values = drawn(1.0)
    assert estimate(values, values).change == 0


@pytest.mark.parametrize("n_null", [19, 199])
def test_the_edits_change_is_what_the_same_set_gets_as_a_control(n_null):
    """A rank among controls needs one procedure for all of them: the same shuffles, the same null subtracted."""
    arm, before, after = InformationArm(units_of(0, 6), FIRST, SECOND), reads_from(drawn(1.0)), reads_from(drawn(0.5))
    config = MutualInformationConfig(k=5, n_shuffles=299, n_null=n_null, n_subsamples=2)
    estimand = BeforeAfter(config, before, arm, ("fairness", "privacy"))
    (shift,) = estimand.information(after, []).shifts
    assert estimand.changes(arm, after) == {"|layer 0": pytest.approx(shift.change, abs=1e-12)}


def test_silenced_neurons_are_in_neither_read_so_nothing_falls_by_construction():
    before = drawn(1.0)
    after = before.clone()
    after[:, [0, 6]] = 0  # the ablated ones are zero, as they will be; all others are untouched
    layer = estimate(before, after)
    assert layer.n_units == (5, 5)
    assert layer.change == 0


def test_the_null_keeps_what_the_topic_alone_explains():
    """Neurons that only know which behaviour a prompt is of depend on each other, and on nothing else."""
    generator = torch.Generator().manual_seed(0)
    topic = torch.tensor([1.0] * (N // 2) + [-1.0] * (N // 2))[:, None]
    values = 2 * topic + torch.randn(N, D, generator=generator)
    layer = estimate(values, values)
    assert layer.before.value > 0.5
    assert layer.before.value == pytest.approx(layer.before.null_mean, abs=0.1)
    assert layer.before.p > 0.01


def test_independent_neurons_give_a_uniform_p_value():
    p = [estimate(drawn(0.0, seed), drawn(0.0, seed), n_shuffles=99).before.p for seed in range(60)]
    assert 0.35 < sum(p) / len(p) < 0.65
    assert sum(value <= 0.05 for value in p) <= 8


def test_the_estimate_is_repeatable_and_the_read_noise_is_the_seeds():
    values = drawn(1.0)
    assert estimate(values, values, seed=3) == estimate(values, values, seed=3)
    assert estimate(values, values, seed=3).before.value != estimate(values, values, seed=4).before.value


def test_a_dead_side_is_flagged_and_informs_of_nothing():
    values = drawn(1.0)
    values[:, :6] = 0.5
    layer = estimate(values, values)
    assert abs(layer.before.excess) < 0.15 and "a side without neurons or variance" in layer.flags
    nothing = estimate(drawn(1.0), drawn(1.0), ablated=FIRST)
    assert nothing.n_units[0] == 0 and nothing.before.value == 0 and nothing.flags


def test_few_prompts_are_flagged_and_too_few_refused():
    assert "fewer than 80 prompts for 10 dimensions" in estimate(drawn(1.0)[:60], drawn(1.0)[:60]).flags
    said = (
        r"9 distinct test prompts are too few for k=5 components a side \(a smaller k needs fewer\): give at least 24"
    )
    with pytest.raises(InputError, match=said):
        estimate(drawn(1.0)[:9], drawn(1.0)[:9])


def answered(sizes, seed):
    """Random activations at prompts and answers, with the sizes of each behaviour's topics."""
    groups, clusters = [], []
    for name, of_topics in sizes.items():
        for topic, size in enumerate(of_topics):
            groups += [name] * size
            clusters += [f"{name}: {topic}"] * size
    generator = torch.Generator().manual_seed(seed)
    n = len(groups)
    at_prompts, at_answers = torch.randn(n, D, generator=generator), torch.randn(n, 2, D, generator=generator)
    residual = {0: torch.randn(n, 8, generator=generator)}
    return Activations({SITE: at_prompts}, EVERY, tuple(groups), tuple(clusters), {SITE: at_answers}, residual)


def asked(sizes, estimand, calibration=None):
    arm = InformationArm(units_of(0, 6), FIRST, SECOND)
    config = MutualInformationConfig(estimand, n_shuffles=5, n_subsamples=10)
    names = ("fairness", "privacy")
    estimates = BeforeAfter(config, answered(sizes, 0), arm, names, calibration=calibration)
    return estimates.information(answered(sizes, 1), [])


@pytest.mark.parametrize("sizes", [(24,), (12, 12), (2, 2, 36), (12, 6, 6), (1, 23), (10, *[1] * 10)])
@pytest.mark.parametrize("estimand", ["downstream_mi", "awareness_mi", "label_information", "paper_nhsic"])
def test_few_topics_and_topics_of_unequal_size_have_an_estimate_with_an_interval(estimand, sizes):
    for shift in asked({"fairness": sizes, "privacy": sizes}, estimand).shifts:
        assert shift.low < shift.change < shift.high


@pytest.mark.parametrize(
    ("sizes", "estimand", "said"),
    [
        (
            {"fairness": [1] * 20},
            "label_information",
            "0 distinct test prompts of 'privacy' are too few for label_info",
        ),
        ({"fairness": [1] * 20, "privacy": [3]}, "paper_nhsic", "3 distinct test prompts of 'privacy' .* at least 4"),
        ({"fairness": [1] * 20, "privacy": [7]}, "awareness_mi", "7 distinct test prompts of 'privacy' .* at least 8"),
        ({"fairness": [9], "privacy": [9], "more": [2]}, "awareness_mi", "2 distinct test prompts of 'more'"),
    ],
)
def test_a_behaviour_with_hardly_a_prompt_of_its_own_is_refused_before_any_estimate(sizes, estimand, said):
    with pytest.raises(InputError, match=said):
        asked(sizes, estimand)


def test_a_probe_without_a_calibration_prompt_of_its_own_is_refused():
    with pytest.raises(InputError, match="no calibration prompt is of 'privacy'"):
        asked({"fairness": [9], "privacy": [9]}, "awareness_mi", answered({"fairness": [9]}, 2))


def behaviours(n=8):
    return [
        Behaviour(
            name, tuple(Example(f"{name} {i} {'so ' * (i % 3)}?", {"safe": "y", "unsafe": "n"}) for i in range(n))
        )
        for name in ("fairness", "privacy")
    ]


@pytest.mark.hooks
def test_mutual_information_runs_on_a_model_and_reads_what_measure_reads(llama):
    first, second, ablated = some_neurons(llama, seed=1), some_neurons(llama, seed=2), some_neurons(llama, seed=3)
    twice = [*behaviours(), Behaviour("again", behaviours()[0].examples)]
    config = MutualInformationConfig(k=2, n_shuffles=49, n_subsamples=4)
    reads = {"first_neurons": first, "second_neurons": second}
    result = mutual_information(llama, twice, **reads, ablated=ablated, config=config)
    assert result.n_prompts == 16, "a prompt that stands twice counts once"
    assert [layer.layers for layer in result.layers] == [(0,), (1,), (2,)]
    assert result.estimand == "downstream_mi" and len(result.changes) == 3
    # in the first layer nothing lies upstream, so an ablation cannot change other neurons of it
    assert result.layers[0].change == pytest.approx(0, abs=1e-5)
    assert any(abs(layer.change) > 1e-3 for layer in result.layers[1:])


@pytest.mark.hooks
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_hooked_transformer_of_the_same_weights_gives_equal_estimates(checkpoints, tokenizer, name):
    hooked, bridge = as_hooked_transformer(checkpoints[name], tokenizer), load_model(checkpoints[name], device="cpu")
    options = {
        "first_neurons": some_neurons(bridge, seed=1),
        "second_neurons": some_neurons(bridge, seed=2),
        "config": MutualInformationConfig(k=2, n_shuffles=19, n_subsamples=4),
    }
    ours, theirs = (
        mutual_information(model, behaviours(), ablated=some_neurons(bridge, seed=3), **options)
        for model in (bridge, hooked)
    )
    assert ours.changes == pytest.approx(theirs.changes, abs=2e-3)


@pytest.mark.hooks
def test_unknown_estimands_and_scored_prompts_are_refused(llama, untyped):
    units = some_neurons(llama)
    options = {"first_neurons": units, "second_neurons": units, "ablated": units}
    with pytest.raises(InputError, match="estimand must be one of"):
        mutual_information(llama, behaviours(), **options, config=MutualInformationConfig("score_mi"))
    calibration = Behaviour("fairness", behaviours()[0].examples, split="calibration")
    with pytest.raises(InputError, match="calibration split"):
        mutual_information(llama, [calibration, behaviours()[1]], **options)


def test_probes_are_not_fitted_on_a_test_prompt_that_is_written_otherwise(llama):
    units = some_neurons(llama)
    shouted = []
    for behaviour in behaviours():
        examples = tuple(Example(f"{one.prompt.upper()}!", one.answers) for one in behaviour.examples)
        shouted.append(Behaviour(behaviour.name, examples))
    options = {"first_neurons": units, "second_neurons": units, "ablated": units, "calibration": shouted}
    with pytest.raises(InputError, match="16 calibration prompts are test prompts too"):
        mutual_information(llama, behaviours(), **options, config=MutualInformationConfig("awareness_mi"))


def test_calibration_without_pairs_is_refused_before_any_pass(llama, monkeypatch):
    units = some_neurons(llama)
    single = [Behaviour(name, (Example(f"{name}?", {"response": "y"}),)) for name in ("fairness", "privacy")]
    options = {"first_neurons": units, "second_neurons": units, "ablated": units, "calibration": single}
    monkeypatch.setattr("dean_interp.information.compare.read_activations", None)
    with pytest.raises(InputError, match="'fairness' has prompts without a safe and an unsafe answer"):
        mutual_information(llama, behaviours(), **options, config=MutualInformationConfig("awareness_mi"))


def test_controls_are_not_taken_up_from_a_call_that_fitted_its_probes_on_other_data(llama, tmp_path):
    first, second = behaviours()
    third = Behaviour("third", first.examples)
    arm = InformationArm(some_neurons(llama), some_neurons(llama), some_neurons(llama))
    options = {"configs": [MutualInformationConfig("awareness_mi")], "arms": [arm], "template": "raw"}
    fingerprints = set()
    for n_measured in (2, 3):
        data = [first, second, third, first, second]
        tests, calibration = data[:n_measured], data[n_measured:]
        kept = kept_controls(tmp_path, llama, tests=tests, calibration=calibration, **options)
        fingerprints.add(kept.fingerprint)
    assert len(fingerprints) == 2


def test_a_file_of_finished_controls_that_is_damaged_is_refused_by_name_and_stays_as_it_is(llama, tmp_path):
    """Whatever was cut off, or is of another type."""
    arm = InformationArm(some_neurons(llama), some_neurons(llama), some_neurons(llama))
    kept = kept_controls(tmp_path, llama, tests=behaviours(), calibration=[], arms=[arm], template="raw",
                         configs=[MutualInformationConfig("awareness_mi")])  # fmt: skip
    kept.save([[{"first": 1.0}]])
    whole = (tmp_path / "controls.json").read_bytes()
    for damaged in (b"", whole[:20], whole[:-4], whole.replace(b"1.0", b"[]"), b"\xff\xfe", b"[]"):
        (tmp_path / "controls.json").write_bytes(damaged)
        with pytest.raises(InputError, match=r"controls\.json is damaged .*: where it is deleted, .* makes it anew"):
            kept.load()
        assert (tmp_path / "controls.json").read_bytes() == damaged
    (tmp_path / "controls.json").unlink()
    assert kept.load() == []


def random_gates(model, *, n_zero=5):
    """Gates between 0 and 2 at every neuron, some of them 0."""
    generator = torch.Generator().manual_seed(3)
    multipliers = {}
    for site in neuron_sites(model):
        multiplier = 2 * torch.rand(model.cfg.d_mlp, generator=generator)
        multiplier[:n_zero] = 0
        multipliers[site] = multiplier
    return Gates(multipliers)


def test_the_activation_of_a_gated_neuron_is_taken_before_its_gate(llama):
    """It is what the neuron is where the gates are in the weights: there they scale what a neuron writes."""
    gates = random_gates(llama)
    every = Selection({site: torch.arange(llama.cfg.d_mlp) for site in gates.multipliers}, gates.selection.shapes)
    with gated(llama, gates):
        under = read_activations(llama, behaviours(), every, answers=True).before(gates)
    edit = create_gates_edit(llama, gates)
    apply_edit(llama, edit)
    expected = read_activations(llama, behaviours(), every, answers=True)
    revert_edit(llama, edit)
    for site, gate in gates.multipliers.items():
        for found, wanted in ((under.values, expected.values), (under.answers, expected.answers)):
            torch.testing.assert_close(found[site][..., gate > 0], wanted[site][..., gate > 0], rtol=1e-4, atol=1e-5)
            assert (found[site][..., gate == 0] == 0).all()


def test_gates_that_silence_give_what_the_silenced_neurons_give(llama):
    first, second, silenced = some_neurons(llama, 8), some_neurons(llama, 8, seed=1), some_neurons(llama, 4, seed=2)
    multipliers = {site: torch.ones(shape) for site, shape in silenced.shapes.items()}
    for site, units in silenced.units.items():
        multipliers[site][units] = 0
    options = {
        "first_neurons": first,
        "second_neurons": second,
        "config": MutualInformationConfig(k=2, n_shuffles=19, n_subsamples=2),
    }
    found = []
    for ablated in (silenced, Gates(multipliers)):
        found.append(mutual_information(llama, behaviours(16), ablated=ablated, controls=[ablated], **options))
    assert found[0].shifts == found[1].shifts
    assert any(shift.change for shift in found[0].shifts)
