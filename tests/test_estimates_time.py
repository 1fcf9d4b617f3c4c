"""The time of estimates of mutual information: counted by layers, states and edits, beside what they take."""

import dataclasses

import pytest

from dean_interp import load_behaviour
from dean_interp.information.estimands import HEADLINES
from dean_interp.planning import estimates as planned
from dean_interp.planning.estimates import Estimates, estimates_of, time_of
from dean_interp.planning.stopwatch import Took


@pytest.fixture
def few():
    tests = [load_behaviour(name, n_examples=24, split="test") for name in ("fairness", "privacy")]
    return Estimates(tests, n_layers=2, n_neurons=6, n_edits=1, n_controls=2)


def test_every_layer_takes_as_long_and_all_as_one_once_more(few, monkeypatch):
    rounds = iter([2.0, 3.0])
    monkeypatch.setattr(planned, "_seconds_of_layer", lambda estimates: next(rounds))
    span = time_of(dataclasses.replace(few, n_layers=9))
    assert (span.low, span.seconds, span.high) == pytest.approx((20.0, 25.0, 30.0))


def test_controls_and_edits_each_take_their_time(few, monkeypatch):
    """Of every estimand: the first state and each control after it, and each edit."""
    monkeypatch.setattr(planned, "timed", lambda work: (work(), Took(1.0, 1.0))[1])

    def seconds(**other: int) -> float:
        return planned._seconds_of_layer(dataclasses.replace(few, **other)) / len(HEADLINES)

    assert seconds() == 2 + few.n_edits
    assert seconds(n_controls=40) == 40 + few.n_edits
    assert seconds(n_edits=5) == 2 + 5


def test_the_neurons_of_a_layer_are_the_fraction_and_at_least_one(llama):
    tests = [load_behaviour(name, n_examples=24, split="test") for name in ("fairness", "privacy", "general")]
    found = estimates_of(llama, tests, 0.25, n_edits=1, n_controls=3)
    d_mlp = llama.cfg.d_mlp
    assert (found.n_layers, found.n_neurons) == (len(llama.blocks), round(0.25 * d_mlp))
    assert [behaviour.name for behaviour in found.tests] == ["fairness", "privacy"]
    assert estimates_of(llama, tests, 1e-6, n_edits=1, n_controls=3).n_neurons == 1
