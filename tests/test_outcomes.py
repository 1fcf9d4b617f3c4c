"""One table of everything: paired, clustered, adjusted, beside controls; missing numbers are counted, not guessed."""

import numpy as np
import pytest
from scipy.stats import binomtest

from dean_interp import Behaviour, Example, InputError
from dean_interp.evaluation.judges import Verdict
from dean_interp.evaluation.line_table import lines_table, p_text
from dean_interp.evaluation.lines import compare, detectable_changes
from dean_interp.evaluation.outcomes import MARGIN, Outcome, answer_outcomes, as_numbers
from dean_interp.report import page
from dean_interp.statistics import clustered_interval, detectable_difference
from dean_interp.study.confirmation import Condition, SignTest, conditions

CLUSTERS = tuple(f"topic {i}" for i in range(20))


def outcome(values: object, *, on: str = "fairness", unit: str = "share", better: str = "higher") -> Outcome:
    return Outcome("safe answers", on, unit, better, np.asarray(values, dtype=float), CLUSTERS)


def test_a_line_is_the_paired_change_with_mcnemars_p():
    before, after = np.arange(20) < 8, (np.arange(20) < 14) & (np.arange(20) != 0)
    (line,) = compare([outcome(before)], [outcome(after)])
    assert (line.before.mean, line.after.mean, line.change.mean) == pytest.approx((0.4, 0.65, 0.25))
    difference = after.astype(float) - before
    assert line.change == clustered_interval(difference, CLUSTERS)
    mcnemar = binomtest(6, 7).pvalue  # 7 changed, and 6 of them from no to yes
    assert line.p == pytest.approx(mcnemar, abs=0.02) and line.p_holm == line.p
    assert line.rank is None and line.control_changes == ()


def test_missing_numbers_are_left_out_in_pairs_and_counted():
    before, after = np.ones(20), np.zeros(20)
    before[0], after[1] = np.nan, np.nan
    (line,) = compare([outcome(before)], [outcome(after)])
    assert (line.n, line.n_missing, line.n_clusters) == (18, 2, 18)
    assert (line.before.mean, line.after.mean) == (1, 0)


def test_an_infinite_number_is_missing_too_since_it_has_no_mean():
    before, after = np.arange(20.0), np.arange(20.0) + 1
    after[3], before[4] = np.inf, -np.inf
    control = np.arange(20.0)
    control[5] = np.inf
    states = [outcome(values, unit="nats") for values in (before, after, control)]
    (line,) = compare([states[0]], [states[1]], [[states[2]]])
    assert (line.n, line.n_missing) == (18, 2)
    assert (line.change.mean, line.change.low, line.change.high) == (1, 1, 1) and 0 < line.p < 0.001
    assert line.control_changes == (0,)


def test_numbers_that_are_shares_in_one_state_alone_are_compared_as_numbers():
    before, after = outcome(np.arange(20) < 8), outcome(np.arange(20.0), unit="mean over items")
    for line in (*compare([before], [after]), *compare([after], [before])):
        assert line.unit == "mean over items" and abs(line.change.mean) == pytest.approx(9.1)
        assert line.change.low < line.change.mean < line.change.high


def test_an_outcome_without_numbers_is_no_line():
    nothing = np.full(20, np.nan)
    assert compare([outcome(nothing)], [outcome(nothing)], [[outcome(nothing)]]) == []


@pytest.mark.parametrize(("better", "rank"), [("higher", 0.25), ("lower", 1.0), ("neither", None)])
def test_the_rank_asks_whether_controls_are_as_good(better, rank):
    def moved(by: float) -> Outcome:
        return outcome(np.arange(20.0) + by, unit="nats", better=better)

    (line,) = compare([moved(0)], [moved(3)], [[moved(1)], [moved(2)], [moved(-1)]])
    assert line.control_changes == (1, 2, -1) and line.rank == rank


def test_holm_is_over_the_sets_of_one_metric():
    before, after = outcome(np.zeros(20)), outcome(np.arange(20) < 6)
    other = [outcome(one.values, on="privacy") for one in (before, after)]
    alone = compare([before], [after])[0].p
    assert [line.p_holm for line in compare([before, other[0]], [after, other[1]])] == [2 * alone] * 2


def test_what_a_design_detects_comes_from_controls_else_from_an_assumption():
    def detectable(unit: str, *changes: object) -> float | None:
        original = outcome(np.zeros(20), unit=unit)
        controls = [[outcome(change, unit=unit)] for change in changes]
        return detectable_changes([original], controls)[original.key]

    # Twenty topics of one prompt each, whose changes have a standard deviation of 1 (times 20/19, as a sample).
    changes = np.array([0.0, 2.0] * 10), np.array([1.0, -1.0] * 10)
    error = (20 / 19 / 20) ** 0.5
    assert detectable("nats", *changes) == pytest.approx(detectable_difference(error, 20))
    assert detectable("nats") is None
    assert detectable("share") == pytest.approx(detectable_difference((0.2 / 20) ** 0.5, 20))
    assert detectable("share", np.full(20, np.nan)) == detectable("share")


def test_a_design_of_two_prompts_detects_no_change_of_a_share():
    before, after = (
        Outcome("safe answers", "fairness", "share", "higher", np.array(safe), ("topic 1", "topic 2"))
        for safe in ([0.0, 1.0], [1.0, 1.0])
    )
    (line,) = compare([before], [after])
    assert line.detectable is not None and line.detectable > 1
    (row,) = (row for row in lines_table([line]).splitlines() if row.startswith("  fairness"))
    assert row.split()[-1] == ">100" and page.detectable(line) == "> 100"


def test_states_of_other_prompts_cannot_be_compared():
    other = Outcome("safe answers", "fairness", "share", "higher", np.zeros(20), CLUSTERS[::-1])
    fewer = Outcome("safe answers", "fairness", "share", "higher", np.zeros(19), CLUSTERS[1:])
    original = outcome(np.zeros(20))
    for state in (other, fewer):
        with pytest.raises(InputError, match="other prompts"):
            compare([original], [state])
        with pytest.raises(InputError, match="other prompts"):
            compare([original], [original], [[state]])


def test_the_table_has_every_line_with_its_interval():
    text = lines_table(compare([outcome(np.arange(20) < 8)], [outcome(np.arange(20) < 14)]))
    assert "safe answers (share, higher is better)" in text and "40.0 [" in text and "+30.0 [" in text


ASKED = Behaviour("fairness", tuple(Example(f"p{i}", {}, f"t{i}") for i in range(3)), split="test")


def test_no_p_value_is_written_as_0():
    assert [p_text(p) for p in (1.0, 0.05, 0.0005, 0.0002)] == ["1.000", "0.050", "0.001", "2e-04"]


def test_an_answer_that_cannot_be_read_is_not_safe_whoever_judges():
    answers = ["I can't help with that.", "the the the the the the the the the the the the the the", "Ask them both."]
    verdicts = {"guard": [Verdict("safe"), Verdict("safe"), Verdict(None, fault="unparsed")]}
    found = {one.metric: one for one in answer_outcomes("harmful", ASKED, answers, verdicts, 64)}
    assert found["safe answers (guard), at 64 tokens"].values.tolist()[:2] == [1, 0]
    assert np.isnan(found["safe answers (guard), at 64 tokens"].values[2])
    assert found["refusals, at 64 tokens"].values.tolist() == [1, 0, 0]
    assert found["incoherent answers, at 64 tokens"].values.tolist() == [0, 1, 0]
    assert found["refusals, at 64 tokens"].clusters == ("t0", "t1", "t2")


def test_a_refusal_of_a_benign_question_counts_against():
    answers = ["I'm sorry, but I can't assist with that.", "Lyon.", "It is important to note that it rains."]
    benign = {one.metric: one for one in answer_outcomes("over_refusal", ASKED, answers, {}, 8)}
    general = {one.metric: one for one in answer_outcomes("general", ASKED, answers, {}, 8)}
    assert benign["over-refusal, at 8 tokens"].values.tolist() == [1, 0, 0]
    assert benign["over-refusal, at 8 tokens"].better == "lower"
    assert general["plain answers to benign questions, at 8 tokens"].values.tolist() == [0, 1, 1]
    assert benign["answers with a cautionary phrase, at 8 tokens"].values.tolist() == [0, 0, 1]


def test_yes_and_no_and_nothing():
    assert np.array_equal(as_numbers([True, False, None]), [1, 0, np.nan], equal_nan=True)


def test_the_interval_of_a_change_of_shares_stays_within_all_and_none():
    clusters = ("a", "b")
    before = Outcome("safe answers", "fairness", "share", "higher", np.array([1.0, 1.0]), clusters)
    after = Outcome("safe answers", "fairness", "share", "higher", np.array([1.0, 0.0]), clusters)
    (line,) = compare([before], [after])
    assert (line.change.mean, line.change.low, line.change.high) == (-0.5, -1, 1)


def conditions_by_name(
    n_answers: int, rise: float, *, n_unread: int = 0, answered: tuple[str, ...] = ("one",)
) -> dict[str, Condition]:
    """The conditions of an edit that moves both margins and the register set by known amounts."""
    noise = np.linspace(-0.001, 0.001, 20)
    sets = {"one": rise, "two": 2 * rise, "register": 0.1}
    before = [Outcome(MARGIN, on, "nats per token", "higher", noise, CLUSTERS) for on in sets]
    after = [Outcome(MARGIN, on, "nats per token", "higher", 0 * noise + by, CLUSTERS) for on, by in sets.items()]
    safe = np.where(np.arange(n_answers) < n_unread, np.nan, 1.0)
    before.append(Outcome("safe answers", "one", "share", "higher", np.ones(n_answers), CLUSTERS[:n_answers]))
    after.append(Outcome("safe answers", "one", "share", "higher", safe, CLUSTERS[:n_answers]))
    lines = compare(before, after, [before])
    signs = [SignTest(on, lines[0].change, lines[0].change, (0.0,), p=0.05) for on in ("one", "two")]
    found = conditions(lines, ("one", "two"), signs, register="register", answered=answered)
    return {each.name: each for each in found}


def test_a_rise_is_more_than_register_only_where_there_is_a_rise():
    name = "it is more than register"
    assert conditions_by_name(20, rise=0.4)[name].holds
    assert conditions_by_name(20, rise=0.4)[name].text.endswith("0.25 of the smaller rise")
    fallen = conditions_by_name(20, rise=-0.4)[name]
    assert not fallen.holds and fallen.text.endswith("there is no rise to compare this with")


@pytest.mark.parametrize(("n_answers", "holds", "text"), [(20, True, "may go unseen"), (3, False, "too few")])
def test_few_answers_do_not_show_that_answers_stay_good(n_answers, holds, text):
    found = conditions_by_name(n_answers, rise=0.4)["answers stay safe and coherent"]
    assert found.holds is holds and text in found.text


@pytest.mark.parametrize(
    ("n_unread", "text"),
    [(3, "3 of 20 answers to one prompts have no verdict"), (20, "no answers to one prompts have a verdict")],
)
def test_an_edit_is_not_confirmed_by_answers_that_nobody_could_judge(n_unread, text):
    name = "answers stay safe and coherent"
    assert conditions_by_name(20, rise=0.4, n_unread=2)[name].holds, "a tenth may be missing"
    found = conditions_by_name(20, rise=0.4, n_unread=n_unread)[name]
    assert not found.holds and text in found.text
    assert name not in conditions_by_name(20, rise=0.4, answered=())
