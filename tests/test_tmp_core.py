import sys
import types

for _n, _c in (("circuit_page", ["CircuitPage"]), ("neuron_page", ["NeuronPage", "neuron_view"])):
    _m = types.ModuleType("dean_interp.report." + _n)
    for _k in _c:
        setattr(_m, _k, None)
    sys.modules["dean_interp.report." + _n] = _m

from dean_interp.scoring.scores import load_scores
from dean_interp.selection.selection import load_selection
from dean_interp.study.config import *
from dean_interp.study.evaluate import estimate_information, evaluate_edit
from dean_interp.study.run import run_study
from dean_interp.study.sweep import run_sweep, sweep_headline


def test_x(one_layer, tmp_path):
    model = ModelConfig(str(one_layer), device="cpu")
    data = DataConfig(n_test=12, n_general_test=6, answer_tokens=6)
    cal = CalibrationConfig(n_calibration=20)
    controls = ControlConfig(3, 2)
    answers = AnswerConfig(n_answers=3, answer_lengths=(2, 4), n_answer_controls=1, window=200)
    cfg = StudyConfig(
        model=model,
        data=data,
        calibration=cal,
        controls=controls,
        answers=answers,
        neuron_fraction=0.2,
        weight_fraction=0.03,
        information_fraction=0.3,
    )
    r = run_study(cfg, tmp_path / "run")
    print(r)
    for u in r.units:
        print(u.to_pandas())
        print(u.to_lines())
        print(u.design)
        print(u.information)
    scores = [
        load_scores(p)
        for p in [tmp_path / "run" / "scores" / f"{n}.safetensors" for n in ("fairness", "privacy", "general")]
    ]
    sel = load_selection(tmp_path / "run" / "selection.neuron.safetensors")
    e = evaluate_edit(
        sel,
        scores,
        EvaluationConfig(model=model, data=data, controls=controls, answers=answers, information_fraction=0.3),
        tmp_path / "ev",
    )
    print(e)
    assert e.lines == r.of("neuron").edit.lines or print(
        [(a, b) for a, b in zip(e.lines, r.of("neuron").edit.lines) if a != b][:1]
    )
    i = estimate_information(
        sel,
        scores,
        InformationConfig(model=model, data=data, controls=controls, information_fraction=0.3),
        tmp_path / "ev",
    )
    print(i == r.of("neuron").information)
    s = run_sweep(
        SweepConfig(
            model=model,
            data=data,
            calibration=cal,
            neuron_fractions=(0.2, 0.4),
            weight_fractions=(0.03,),
            controls=controls,
        ),
        tmp_path / "sw",
    )
    print(s, sweep_headline(s))
    from dean_interp.study.verify import verify_run

    print(verify_run(tmp_path / "run"))
