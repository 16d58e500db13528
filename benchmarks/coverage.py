"""How often intervals and tests of a comparison are right: ``python -m benchmarks.coverage``.

A study of six equal systems answers rows by a probit model with effects of seed, row, system and
row, and the rest. Measured: how often a 95 % interval of one system covers the truth, its width,
and how often a test of two systems is significant, at 5 % and at 0.1 % (where a correction for
some fifty tests looks). Three ways: spread over seeds pooled over the systems, as ``skillnet
compare`` does; each system's own spread; and a plain crossed bootstrap (seeds and rows
resampled, percentiles; source: Owen 2007, the pigeonhole bootstrap). Prints Markdown.
"""

import argparse

import numpy as np
from scipy import stats

from sweeps.analysis import statistics
from sweeps.analysis.statistics import RunSample

ROWS, SYSTEMS = 300, 6
BY_ROW, BY_BOTH, REST, MIDDLE = 1.0, 0.4, 0.6, 0.5
LEVELS = (0.05, 0.001)


def answers(random: np.random.Generator, seeds: int, by_seed: float) -> np.ndarray:
    """Right (1) or wrong (0), (systems, seeds, rows)."""
    row_N = random.normal(0, BY_ROW, ROWS)
    both_K1N = random.normal(0, BY_BOTH, (SYSTEMS, 1, ROWS))
    seed_KS1 = random.normal(0, by_seed, (SYSTEMS, seeds, 1))
    rest_KSN = random.normal(0, REST, (SYSTEMS, seeds, ROWS))
    return (MIDDLE + row_N + both_K1N + seed_KS1 + rest_KSN > 0).astype(float)


def truth(by_seed: float) -> float:
    """Share of right answers over all seeds and rows."""
    scale = np.sqrt(by_seed**2 + BY_ROW**2 + BY_BOTH**2 + REST**2)
    return float(stats.norm.cdf(MIDDLE / scale))


def spread(by_seed: float) -> float:
    """Standard deviation of the accuracy over seeds, all rows known."""
    scale = np.sqrt(BY_ROW**2 + BY_BOTH**2 + REST**2)
    seeds = np.random.default_rng(0).normal(0, by_seed, 100_000)
    return float(stats.norm.cdf((MIDDLE + seeds) / scale).std())


def bootstrap(values_SN: np.ndarray, random: np.random.Generator, draws: int = 500) -> np.ndarray:
    """95 % interval of a crossed bootstrap of the mean."""
    seeds, rows = values_SN.shape
    count_DN = random.multinomial(rows, np.full(rows, 1 / rows), draws)
    count_DS = random.multinomial(seeds, np.full(seeds, 1 / seeds), draws)
    means_D = (count_DN @ values_SN.T * count_DS).sum(1) / (rows * seeds)
    return np.quantile(means_D, [0.025, 0.975])


def measure(seeds: int, by_seed: float, trials: int, random: np.random.Generator) -> list[str]:
    """One line of the table."""
    right = truth(by_seed)
    cover, width, alarms = np.zeros(3), np.zeros(3), np.zeros((3, len(LEVELS)))
    tests = trials * (SYSTEMS - 1)
    for _ in range(trials):
        answers_KSN = answers(random, seeds, by_seed)
        study: list[RunSample] = [
            statistics.build_sample(dict(enumerate(own)), np.ones(ROWS), "t") for own in answers_KSN
        ]
        pooled = statistics.pool_seed_variance(study)
        assert pooled is not None
        ours = (statistics.estimate_mean(study[0], pooled), statistics.estimate_mean(study[0]))
        intervals: list[tuple[float, float]] = [(each.low, each.high) for each in ours]
        low, high = bootstrap(answers_KSN[0], random)
        intervals.append((float(low), float(high)))
        for place, (low, high) in enumerate(intervals):
            cover[place] += low <= right <= high
            width[place] += high - low
        for other in range(1, SYSTEMS):
            change = statistics.subtract_samples(study[other], study[0])
            for place, known in enumerate((pooled.for_difference(), None)):
                alarms[place] += statistics.compute_p_value(change, known) <= np.array(LEVELS)
            low, high = bootstrap(answers_KSN[other] - answers_KSN[0], random, 200)
            alarms[2, 0] += not low <= 0 <= high
    cells = [str(seeds), f"{100 * spread(by_seed):.1f}"]
    for place in range(3):
        cells += [f"{100 * cover[place] / trials:.0f}", f"{100 * width[place] / trials:.1f}"]
        cells.append(f"{100 * alarms[place, 0] / tests:.1f}")
        if place < 2:
            cells.append(f"{100 * alarms[place, 1] / tests:.2f}")
    return cells


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.coverage``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coverage", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000)
    options = parser.parse_args(argv)
    random = np.random.default_rng(0)
    columns = ["seeds", "spread over seeds", "**pooled**: covers", "width", "at 5 %", "at 0.1 %"]
    columns += ["**own**: covers", "width", "at 5 %", "at 0.1 %"]
    columns += ["**bootstrap**: covers", "width", "at 5 %"]
    print(f"| {' | '.join(columns)} |\n{'|---:' * len(columns)}|")
    for seeds in (2, 3, 5):
        for by_seed in (0.0, 0.05, 0.15):
            print(f"| {' | '.join(measure(seeds, by_seed, options.trials, random))} |", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
