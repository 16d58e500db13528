"""Intervals and tests over seeds and rows: coverage, size, power and edge cases."""

import numpy as np
import pytest
from scipy import stats

from skillnet_evidence import statistics as st
from skillnet_evidence.units import compute_least_error

ROWS = 150


def world(random, seeds, rows=ROWS, shift=0.0, by_seed=0.1, by_row=1.0, rest=0.7, row_N=None):
    """Draw answers (S, N) of a system, right or wrong, from a probit model with crossed effects."""
    row_N = random.normal(0, by_row, rows) if row_N is None else row_N
    seed_S1 = random.normal(0, by_seed, (seeds, 1))
    return (0.5 + shift + seed_S1 + row_N + random.normal(0, rest, (seeds, rows)) > 0) * 1.0


def truth(shift=0.0, by_seed=0.1, by_row=1.0, rest=0.7):
    return stats.norm.cdf((0.5 + shift) / np.sqrt(by_seed**2 + by_row**2 + rest**2))


def as_sample(answers_SN, key="test", weight=None):
    weight = np.ones(answers_SN.shape[1]) if weight is None else weight
    return st.build_sample(dict(enumerate(answers_SN)), weight, key)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("by_seed", [0.0, 0.1])
def test_intervals_have_their_nominal_coverage(seeds: int, by_seed: float):
    random = np.random.default_rng(seeds)
    right, trials = truth(by_seed=by_seed), 400
    hits = 0
    for _ in range(trials):
        found = st.estimate_mean(as_sample(world(random, seeds, by_seed=by_seed)))
        hits += found.low <= right <= found.high
    # Four standard errors of 400 trials below, and not so wide that they say nothing.
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / trials) <= hits / trials <= 0.99


def p_values(trials: int, shift: float, seeds: int = 4, start: int = 0) -> np.ndarray:
    random = np.random.default_rng(start)
    found = []
    for _ in range(trials):
        row_N = random.normal(0, 1, ROWS)
        one, other = world(random, seeds, row_N=row_N), world(random, seeds, row_N=row_N)
        if shift:
            one = world(random, seeds, shift=shift, row_N=row_N)
        found.append(st.compute_p_value(as_sample(one) - as_sample(other)))
    return np.array(found)


def test_p_values_are_uniform_without_an_effect():
    p = p_values(500, 0.0)
    for share in (0.05, 0.2, 0.5):
        assert np.mean(p <= share) == pytest.approx(share, abs=4 * np.sqrt(share / 500))
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_a_large_effect_is_found_and_pairing_by_row_helps():
    assert np.mean(p_values(60, 0.6) < 0.05) > 0.9
    random = np.random.default_rng(5)
    row_N = random.normal(0, 2, ROWS)
    one = as_sample(world(random, 4, shift=0.2, rest=0.3, row_N=row_N))
    other = as_sample(world(random, 4, rest=0.3, row_N=row_N))
    paired = st.estimate_mean(one - other).std_error
    apart = np.hypot(st.estimate_mean(one).std_error, st.estimate_mean(other).std_error)
    assert paired < 0.7 * apart


def test_pooling_the_seed_variance_limits_false_alarms():
    """Corrections for many tests use small p-values, so these must be accurate."""
    random = np.random.default_rng(3)
    # Of tests of six equal systems with three seeds each.
    p_values = []
    for _ in range(400):
        row_N = random.normal(0, 1, ROWS)
        study = [as_sample(world(random, 3, by_seed=0.15, row_N=row_N)) for _ in range(6)]
        spread = st.pool_seed_variance(study)
        p_values += [st.compute_p_value(x - study[0], spread) for x in study[1:]]
    assert np.mean(np.array(p_values) <= 0.002) <= 0.004
    assert np.mean(np.array(p_values) <= 0.05) <= 0.06


def test_few_seeds_take_the_pooled_variance_and_ten_their_own():
    def sample(values: list[float]) -> st.RunSample:
        seeds, effects_SK = tuple(range(len(values))), np.zeros((len(values), 4))
        return st.RunSample(seeds, np.array(values), {"t": effects_SK}, {"t": 3.0})

    one, two, alone = sample([0.1, 0.2, 0.3]), sample([0.5, 0.5]), sample([0.7])
    spread = st.pool_seed_variance([one, two, alone])
    assert spread == pytest.approx((2 * 0.01 / 3, 3))
    assert st.pool_seed_variance([alone]) is None
    # A system that varies more counts with its own variance, one that varies less with the pool's.
    assert st.estimate_mean(one, spread).std_error == pytest.approx(np.sqrt(0.01 / 3))
    assert st.estimate_mean(two, spread).std_error == pytest.approx(np.sqrt(0.02 / 3 / 2))
    assert st.estimate_mean(alone, spread).std_error == pytest.approx(np.sqrt(0.02 / 3))
    assert st.estimate_mean(two, spread).dof == pytest.approx(3)
    # A larger variance of its own has only its own degrees of freedom.
    assert st.estimate_mean(one, spread).dof == pytest.approx(2)
    five = sample([0.4, 0.41, 0.42, 0.43, 0.44])
    assert st.estimate_mean(five, spread).std_error == pytest.approx(np.sqrt(0.02 / 3 / 5))
    ten = sample([0.4 + 0.01 * n for n in range(10)])
    own = st.estimate_mean(ten, spread)
    assert own.std_error == pytest.approx(np.std(ten.values, ddof=1) / 10**0.5)
    assert own.dof == pytest.approx(9)
    # Welch: the variances of both systems add, with their own degrees of freedom.
    both = st.estimate_mean(ten - one, spread)
    parts = (own.std_error**2, 0.01 / 3)
    assert both.std_error == pytest.approx(np.sqrt(sum(parts)))
    assert both.dof == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 9 + parts[1] ** 2 / 2))


def test_systems_that_vary_unequally_are_tested_at_their_level():
    """A pooled variance gave 10 % false alarms between two systems that vary most."""
    random, alarms, trials = np.random.default_rng(0), 0, 600
    for _ in range(trials):
        samples = []
        for by_seed in (0.04, 0.04, 0.01, 0.01, 0.01, 0.01):
            values = random.normal(0.5, by_seed, 5)
            effects_SK = np.tile(random.normal(0, 0.01, 200), (5, 1))
            samples.append(st.RunSample((0, 1, 2, 3, 4), values, {"t": effects_SK}, {"t": 199.0}))
        spread = st.pool_seed_variance(samples)
        change = samples[0] - samples[1]
        alarms += st.compute_p_value(change, spread) <= 0.05
    assert alarms / trials <= 0.07


def test_one_estimate_by_hand():
    """Two seeds and three rows, with the mean squares of the two-way table computed by hand."""
    answers = np.array([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    found = st.estimate_mean(as_sample(answers))
    assert found.value == pytest.approx(4 / 6)
    # Both seeds reach 2/3: MS_seed 0. Rows: 1, 1/2, 1/2, so MS_row = 2 * var = 1/6;
    # MS_rest = 1 / (1 * 2) = 1/2 is above it, so nothing is left but the least error.
    assert found.std_error == pytest.approx(compute_least_error(3, 2.0))
    unequal = np.array([[1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    mean_N, mean_S = unequal.mean(0), unequal.mean(1)
    ms_seed = 4 * mean_S.var(ddof=1)
    ms_row = 2 * mean_N.var(ddof=1)
    rest = unequal - mean_N - mean_S[:, None] + unequal.mean()
    ms_rest = (rest**2).sum() / 3
    variance = (ms_seed + max(ms_row - ms_rest, 0)) / 8
    found = st.estimate_mean(as_sample(unequal))
    assert found.std_error == pytest.approx(np.sqrt(variance))
    freedom = variance**2 / ((ms_seed / 8) ** 2 / 1 + (max(ms_row - ms_rest, 0) / 8) ** 2 / 3)
    assert found.dof == pytest.approx(freedom)


def test_weighted_rows_give_the_ratio_of_sums():
    amount = np.array([[1.0, 0.0, 4.0, 2.0], [0.0, 1.0, 3.0, 2.0]])
    weight = np.array([2.0, 3.0, 10.0, 5.0])
    found = as_sample(amount, weight=weight)
    assert found.values.tolist() == [7 / 20, 6 / 20]
    # Without its third row, the first run has 3 of 10.
    assert found.effects["test"][0, 2] == pytest.approx(3 * (7 / 20 - 3 / 10))
    with pytest.raises(ValueError, match="sum to more than 0"):
        as_sample(amount, weight=np.zeros(4))


def test_ratios_and_means_agree_with_a_bootstrap_of_rows():
    random = np.random.default_rng(2)
    seeds, systems = 3, {}
    for name, shift in (("a", 0.5), ("b", 0.0)):
        systems[name] = {
            key: world(random, seeds, rows=400, shift=shift, by_seed=0.0) for key in ("x", "y")
        }
    logs = {
        name: st.average_samples(
            [st.take_logarithm(as_sample(systems[name][key], key)) for key in ("x", "y")]
        )
        for name in ("a", "b")
    }
    log = logs["a"] - logs["b"]
    direct = [systems["a"][k].mean() / systems["b"][k].mean() for k in ("x", "y")]
    assert np.exp(log.value) == pytest.approx(np.sqrt(np.prod(direct)))
    draws = []
    for _ in range(800):
        value = 0.0
        for key in ("x", "y"):
            rows = random.integers(0, 400, 400)
            a, b = (systems[name][key][:, rows].mean() for name in ("a", "b"))
            value += np.log(a / b) / 2
        draws.append(value)
    total = 0.0
    for key in ("x", "y"):
        a_K, b_K = (logs[name].effects[key].mean(0) for name in ("a", "b"))
        total += (a_K - b_K).var(ddof=1) / 400
    assert np.sqrt(total) == pytest.approx(np.std(draws), rel=0.12)


def test_a_ratio_of_means_has_no_bias_from_low_denominators():
    """Runs at 0.4 and 0.6 against runs at 0.6 and 0.4 are level; a mean of ratios says 1.08."""
    rows = np.zeros((2, 10))
    rows[0, :4] = rows[1, :6] = 1
    own, other = (st.take_logarithm(as_sample(each)) for each in (rows, rows[::-1]))
    assert (own - other).value == pytest.approx(0.0)
    assert np.mean([0.4 / 0.6, 0.6 / 0.4]) > 1.08


def test_equal_systems_do_not_differ():
    random = np.random.default_rng(0)
    answers = as_sample(world(random, 3))
    none = answers - answers
    assert st.compute_p_value(none) == 1.0
    # Equal answers to all rows do not prove that the systems answer every row alike.
    found = st.estimate_mean(none)
    assert found.value == 0
    assert found.low == -found.high < 0


def test_estimates_without_variance():
    right, wrong = as_sample(np.ones((3, 5))), as_sample(np.zeros((3, 5)))
    for scale in ("share", "error_rate", "free"):
        found = st.estimate_mean(right, least=0, most=1, scale=scale)
        assert found.low < found.value == found.high == 1
        found = st.estimate_mean(wrong, least=0, most=1, scale=scale)
        assert found.low == found.value == 0 < found.high
    assert 0 < st.compute_p_value(right - wrong) < 0.1
    ratio = st.take_logarithm(right) - st.take_logarithm(wrong)
    assert np.isnan([st.compute_p_value(ratio), st.estimate_mean(ratio).low]).all()


def test_a_negative_score_is_worth_nothing():
    errors = np.array([[9.0, 80.0, 3.0], [1.0, 0.0, 0.0]])
    sample = st.clip_sample(as_sample(2 - errors, weight=np.full(3, 2.0)))
    assert sample.values == pytest.approx([0, 5 / 6])
    assert not sample.effects["test"][0].any()
    assert sample.effects["test"][1].any()
    found = st.estimate_mean(sample, least=0, most=1, scale="error_rate")
    assert found.low <= found.value <= found.high


def test_units_of_equal_rows_count_once():
    """Each row ten times is no more evidence than each row once."""
    random = np.random.default_rng(0)
    answers = world(random, 1, rows=60)
    alone = st.estimate_mean(as_sample(answers))
    tenfold = np.repeat(answers, 10, 1)
    units = np.repeat(np.arange(60), 10)
    together = st.build_sample(dict(enumerate(tenfold)), np.ones(600), "test", units)
    assert st.estimate_mean(together)[:5] == pytest.approx(alone[:5])
    as_rows = st.estimate_mean(as_sample(tenfold))
    assert as_rows.std_error < 0.5 * alone.std_error


def test_a_difference_uses_all_runs_of_both_systems():
    random = np.random.default_rng(0)
    answers = world(random, 5)
    one = st.build_sample(dict(enumerate(answers)), np.ones(ROWS), "t")
    two = st.build_sample({7: answers[0], 8: answers[1]}, np.ones(ROWS), "t")
    found = st.estimate_mean(one - two)
    assert found.value == pytest.approx(answers.mean() - answers[:2].mean())
    assert found.seeds == 2


def test_different_rows_are_rejected():
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="150 units cannot be paired with 149"):
        as_sample(world(random, 2)) - as_sample(world(random, 2, rows=149))
    with pytest.raises(ValueError, match="at least one run"):
        st.RunSample((), np.zeros(0), {}, {})
    with pytest.raises(ValueError, match="at least one sample"):
        st.average_samples([])


def test_holm_against_known_values():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert st.correct_p_values([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.correct_p_values([0.5, 0.9]) == [1.0, 1.0]
    assert st.correct_p_values([]) == []
    with_gap = st.correct_p_values([0.01, float("nan"), 0.04])
    assert with_gap[0] == pytest.approx(0.02)
    assert np.isnan(with_gap[1])
    assert with_gap[2] == pytest.approx(0.04)
