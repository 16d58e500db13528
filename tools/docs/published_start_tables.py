"""Tables of the newest start from published weights, for docs/results/published-start.md:
``python -m tools.docs.published_start_tables``.

Reads ``trials.csv`` and ``ranks.csv`` of ``lab/results/<date>-published-start``, which
``python -m lab.published_start`` writes. Intervals cover seeds and held-out modules together.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.measure import read_csv_rows
from lab import RESULTS
from lab.published_start import ARMS, METRICS, RANKS, TRIALS, UNTRAINED, choose_rate
from pipelines.training.evaluation.tables import metric_label
from skillnet_evidence import statistics
from skillnet_evidence.cells import markdown_table
from skillnet_evidence.statistics import RunSample
from tools.docs.page_marks import put

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results" / "published-start.md"
#: What each arm is, in the words of the page.
LABELS = {
    UNTRAINED: "the checkpoint, not trained",
    "published": "**SkillNet, skills from the checkpoint**",
    "random": "the same SkillNet, random weights",
    "library": "`BertModel` per tower, from the checkpoint",
}

TextRows = Sequence[Mapping[str, str]]


def find_newest(results: Path = RESULTS) -> Path | None:
    """Return the folder of the newest experiment; None without one.

    Args:
        results: folder of all kept results.
    """
    return max((path.parent for path in results.glob(f"*-published-start/{RANKS}")), default=None)


def render_page(folder: Path) -> str:
    """Return the text between the marks of the page.

    Args:
        folder: directory of an experiment.
    """
    trials, ranks = read_csv_rows(folder / TRIALS), read_csv_rows(folder / RANKS)
    rates = {UNTRAINED: 0.0, **{arm: choose_rate(trials, arm) for arm in ARMS}}
    chosen = {arm: _select(ranks, arm, lr) for arm, lr in rates.items()}
    seeds = sorted(set.intersection(*({row["seed"] for row in chosen[arm]} for arm in ARMS)))
    cells = []
    columns = [_estimate_metric(chosen, seeds, int(name.rpartition("_")[2])) for name in METRICS]
    for arm, lr in rates.items():
        seconds = [float(r["seconds"]) for r in _select(trials, arm, lr) if r["seed"] in seeds]
        cells.append(
            [LABELS[arm], f"{lr:g}" if lr else "–"]
            + [cell for column in columns for cell in column[arm]]
            + [f"{np.mean(seconds):.0f}" if lr else "–"]
        )
    header = ["arm", "rate"]
    for name in METRICS:
        header += [metric_label(name), "first SkillNet minus this"]
    first = trials[-1]
    tried = sorted({float(row["lr"]) for row in trials if row["arm"] in ARMS})
    test = _select(ranks, UNTRAINED, 0.0)
    return "\n\n".join(
        [
            f"{first['steps']} steps of {first['batch']} pairs, {first['code_tokens']} tokens of a "
            f"function, {_name_seeds(seeds)}; {len(test)} test functions of "
            f"{len({row['unit'] for row in test})} modules; CPU, {first['machine']}, "
            f"{first['date']}. {_describe_rates(tried)}",
            markdown_table([*header, "CPU seconds"], cells),
            f"In per cent and points, with 95 % intervals over {_name_sources(seeds)}. Seconds of "
            "one thread include the evaluation.",
            "Validation R@10 of seed 0 at each rate: "
            + "; ".join(
                f"{arm} "
                + ", ".join(
                    f"{100 * float(r['recall_at_10']):.1f} ({float(r['lr']):g})"
                    for r in trials
                    if r["arm"] == arm and r["seed"] == "0"
                )
                for arm in ARMS
            )
            + ".",
            f"All trials and ranks: [{folder.name}](../../lab/results/{folder.name}).",
        ]
    )


def _describe_rates(tried: Sequence[float]) -> str:
    listed = ", ".join(f"{rate:g}" for rate in tried)
    if len(tried) == 1:
        return f"All arms train at the rate {listed}; no other was tried."
    return (
        f"Each arm tried the rates {listed} with seed 0, and its best R@10 on validation rows "
        "chose one."
    )


def _name_seeds(seeds: Sequence[str]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"


def _name_sources(seeds: Sequence[str]) -> str:
    return (
        "seeds and modules together" if len(seeds) > 1 else "modules alone, because it is one seed"
    )


def _select(rows: TextRows, arm: str, lr: float) -> list[Mapping[str, str]]:
    return [row for row in rows if row["arm"] == arm and float(row["lr"]) == lr]


def _estimate_metric(
    chosen: Mapping[str, TextRows], seeds: Sequence[str], most: int
) -> dict[str, list[str]]:
    """Return two cells per arm: the recall at a rank, and that of ``published`` minus it."""
    samples = {arm: _build_sample(rows, seeds, most) for arm, rows in chosen.items()}
    # The checkpoint answers alike in each seed, so it says nothing about their variance.
    spread = statistics.pool_seed_variance([samples[arm] for arm in ARMS])
    found = {}
    for arm, sample in samples.items():
        mean = statistics.estimate_mean(sample, spread, least=0.0, most=1.0, scale="share")
        cells = [f"{100 * mean.value:.1f} ({100 * mean.low:.1f} to {100 * mean.high:.1f})", ""]
        if arm != ARMS[0]:
            change = statistics.estimate_mean(samples[ARMS[0]] - sample, spread)
            low, high = 100 * change.low, 100 * change.high
            cells[1] = f"{100 * change.value:+.1f} ({low:+.1f} to {high:+.1f})"
        found[arm] = cells
    return found


def _build_sample(rows: TextRows, seeds: Sequence[str], most: int) -> RunSample:
    # The checkpoint is measured once, and answers alike in each seed.
    own = {seed: [row for row in rows if row["seed"] == seed] or rows for seed in seeds}
    hits = {int(seed): [int(row["rank"]) <= most for row in own[seed]] for seed in seeds}
    first = own[seeds[0]]
    units = [int(row["unit"]) for row in first]
    return statistics.build_sample(hits, np.ones(len(first)), "test", units)


def main(argv: list[str] | None = None) -> int:
    """Put the tables of the newest experiment into the page."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.docs.published_start_tables", description=__doc__
    )
    parser.parse_args(argv)
    folder = find_newest()
    if folder is None:
        parser.error("no experiment is kept; run python -m lab.published_start")
    put(PAGE, "published-start", render_page(folder))
    print(f"{PAGE.name} tells {folder.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
