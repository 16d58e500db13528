"""Tune every system of a study equally, on the validation splits.

Three stages, each with the same trials for every system:

1. Settings of ``tuning.space``; the best mean score selects.
2. Rates of the pretraining, ``tuning.pretraining_rates``, of systems that have one.
3. Rates of the run, ``tuning.rates``, with the settings and the pretraining chosen before.

The rates of the last two stages are the tops of parabolas (:func:`fit_best_rate`). The entry points
are :func:`build_stage_trials` and :func:`choose_settings`, called by
:mod:`skillnet_studies.study.study`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Literal

import numpy as np

from skillnet_evidence.format import format_setting
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig, SystemConfig
from skillnet_studies.study.system_runs import (
    PRETRAINING,
    apply_settings,
    build_base_run,
    build_pretraining,
)
from sweeps.search.space import SearchPoint, SearchSpace
from sweeps.trials.trial import Trial, TrialOutcome


@dataclass(frozen=True)
class RateFit:
    """The chosen learning rate, and how it was chosen.

    Args:
        rate: the chosen rate.
        low: rate one standard error of its logarithm below; None if unknown.
        high: rate one standard error above.
        score: value of the parabola at its top, or mean of the trials with the chosen rate.
        note: why the best trial was taken instead of a parabola; empty for a parabola.
    """

    rate: float
    low: float | None
    high: float | None
    score: float
    note: str = ""

    def describe(self) -> str:
        """Return ``1.2e-03 (1.0e-03 to 1.4e-03)``, or the rate with the reason of its choice."""
        if self.note:
            return f"{self.rate:.2g} ({self.note})"
        if self.low is None or self.high is None:
            return f"{self.rate:.2g} (error unknown: three trials)"
        return f"{self.rate:.2g} ({self.low:.2g} to {self.high:.2g})"


def fit_best_rate(rates: Sequence[float], scores: Sequence[float]) -> RateFit:
    """Return the rate at the top of a parabola of the score over log(rate).

    The parabola is fitted to the trials of three adjacent rates, with the best mean score in their
    middle, or at an end if it is the lowest or highest rate (ours). The error is the delta method
    on the covariance of the least-squares fit, whose residuals give the variance of a trial. The
    best trial is taken if fewer than three rates have a score, if the parabola has no top, or if
    the top lies outside of the three rates.

    Args:
        rates: learning rate of each trial; several trials may have one rate.
        scores: score of each trial; higher is better.
    """
    x_N, y_N = np.log(np.asarray(rates, float)), np.asarray(scores, float)
    means = {float(rate): float(y_N[x_N == rate].mean()) for rate in np.unique(x_N)}
    log_best = max(means, key=lambda each: means[each])

    def take_best(note: str) -> RateFit:
        # One of the given numbers: the logarithm of a rate would not give back the same bits.
        rate = next(r for r in rates if math.log(r) == log_best)
        return RateFit(rate, None, None, means[log_best], f"best trial: {note}")

    if len(means) < 3:
        return take_best("fewer than three rates have a score")
    tried = sorted(means)
    first = min(max(tried.index(log_best) - 1, 0), len(tried) - 3)
    is_near_N = np.isin(x_N, tried[first : first + 3])
    x_N, y_N = x_N[is_near_N], y_N[is_near_N]
    # Centred and scaled, because polyfit squares the logarithms.
    center, scale = float(x_N.mean()), float(x_N.std())
    t_N = (x_N - center) / scale
    (a, b, c), covariance = np.polyfit(t_N, y_N, 2, cov="unscaled")
    if a >= 0:
        return take_best("the scores have no top over the rates")
    top = float(-b / (2 * a))
    if not t_N.min() <= top <= t_N.max():
        return take_best("the top lies outside of the tried rates")
    low = high = None
    dof = len(t_N) - 3
    log_rate = center + scale * top
    if dof > 0:
        variance = float(((y_N - np.polyval((a, b, c), t_N)) ** 2).sum()) / dof
        slope_3 = np.array([b / (2 * a * a), -1 / (2 * a), 0.0])
        error = scale * math.sqrt(max(variance * float(slope_3 @ covariance @ slope_3), 0.0))
        low, high = (math.exp(log_rate + sign * error) for sign in (-1, 1))
    return RateFit(math.exp(log_rate), low, high, float(np.polyval((a, b, c), top)))


Stage = Literal["space", "pretraining_rates", "rates"]

#: The stages in order. The pretraining comes before the rate of the run that starts from it.
STAGES: tuple[Stage, ...] = ("space", "pretraining_rates", "rates")

RATE = "training.lr"
#: Stage -> key that its trials set; the trials of the space set many.
RATE_KEYS: dict[Stage, str] = {"pretraining_rates": f"{PRETRAINING}{RATE}", "rates": RATE}
#: First letter of the names of a stage's trials.
PREFIXES: dict[Stage, str] = {"space": "t", "pretraining_rates": "p", "rates": "r"}


@dataclass
class TuningResult:
    """Result of tuning one system.

    Args:
        label: label of the system.
        settings: flat key -> chosen value; empty for the run as configured.
        score: mean validation score of the chosen settings; None without trials.
        trials: stage, settings, seed, status, scores, steps, seconds and commit of each trial.
        reuse_tuning_of: system whose settings were used, or None for own trials.
        rates: key of a tuned rate -> the chosen rate in words, with its standard error or the
            reason why the best trial was taken.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    score: float | None = None
    trials: list[dict[str, Any]] = field(default_factory=list)
    reuse_tuning_of: str | None = None
    rates: dict[str, str] = field(default_factory=dict)


def start_tuning(config: StudyConfig) -> dict[str, TuningResult]:
    """Return the results before any trial: label -> the run as configured."""
    return {
        label: TuningResult(label, reuse_tuning_of=entry.reuse_tuning_of)
        for label, entry in config.systems.items()
    }


def build_stage_trials(
    config: StudyConfig, stage: Stage, tuning: Mapping[str, TuningResult]
) -> list[Trial]:
    """Return the trials of one stage, of all systems; empty without any.

    Args:
        config: the study.
        stage: stage of the tuning that needs the trials.
        tuning: label -> result of the stages before.
    """
    points = _build_points(config, stage)
    trials: list[Trial] = []
    for label, entry in config.systems.items():
        if not points or not _has_trials(config, entry, stage):
            continue
        for index, point in enumerate(points):
            settings = {**tuning[label].settings, **point}
            group = f"{label}-{PREFIXES[stage]}{index}"
            trials += [
                _build_trial(config, label, group, settings, place)
                for place in range(len(config.tuning.seeds))
            ]
    return trials


def _has_trials(config: StudyConfig, entry: SystemConfig, stage: Stage) -> bool:
    """Return whether a system has trials in a stage."""
    if stage == "pretraining_rates" and not entry.pretrain:
        return False
    other = config.systems[entry.reuse_tuning_of] if entry.reuse_tuning_of is not None else None
    if other is None:
        return True
    # A rate that was tuned from random weights is no rate for pretrained ones.
    return stage != "space" and entry.pretrain and not other.pretrain


def _build_points(config: StudyConfig, stage: Stage) -> list[dict[str, Any]]:
    if stage == "space":
        return build_tuning_points(config) if config.tuning.trials else []
    key = RATE_KEYS[stage]
    return [{key: rate} for rate in getattr(config.tuning, stage)]


def _build_trial(
    config: StudyConfig, label: str, group: str, settings: Mapping[str, Any], place: int
) -> Trial:
    """Return a trial with the seed at a place in ``tuning.seeds``."""
    seed = config.tuning.seeds[place]
    run = apply_settings(build_base_run(config, label, seed), settings, "tuning.space")
    fraction = config.tuning.step_fraction
    training = replace(run.training, steps=math.ceil(fraction * run.training.steps))
    # Each seed has the validation rows of another fold, so the scores of a setting have more rows.
    # Folds that no final run tests come first.
    number = (config.folds + place) % max(run.fold.count, 1)
    fold = replace(run.fold, number=number) if run.fold.count else run.fold
    # Trials must not read the test splits.
    run = replace(run, evaluate=False, training=training, fold=fold)
    return Trial(
        f"{group}-seed{seed}",
        run,
        pretrain=build_pretraining(config, label, run, settings),
        splits=("validation",),
        group=group,
        settings={"system": label, **settings},
    )


def build_tuning_points(config: StudyConfig) -> list[dict[str, Any]]:
    """Return the settings of the trials of the space, which are the same for every system.

    The first are the settings as configured, then points spread over the space. Equal points are
    tried once.

    Args:
        config: the study.
    """
    # A grid is a list here: every system has the same number of trials.
    dimensions = {
        name: replace(each, grid=[], choice=each.values) if each.grid else each
        for name, each in config.tuning.space.items()
    }
    space = SearchSpace(dimensions, config.run)
    # The settings as configured are always tried, so tuning cannot end below them by bad luck.
    points: list[dict[str, Any]] = [{}]
    seen = {space.identify_point({})}
    count = config.tuning.trials - 1
    spread = spread_points(space, count, config.tuning.seeds[0], seen)
    return points + [space.resolve_assignments(drawn) for drawn in spread[: max(count, 0)]]


def spread_points(
    space: SearchSpace, count: int, seed: int, seen: Collection[str] = ()
) -> list[SearchPoint]:
    """Return distinct points that cover every dimension; a small space has fewer.

    Repeated points of the Latin hypercube, which lists of few values have, are drawn again.

    Args:
        space: the search space.
        count: number of points.
        seed: seed of the design.
        seen: identities of points that are tried already.
    """
    random, found = np.random.default_rng(seed), dict.fromkeys(seen)
    points: list[SearchPoint] = []
    for planned in space.latin_hypercube_points(count, seed):
        point: SearchPoint | None = planned
        if space.identify_point(planned) in found:
            point = space.draw_unseen(random, found)
        if point is None:
            break
        found[space.identify_point(point)] = None
        points.append(point)
    return points


def choose_settings(
    config: StudyConfig,
    stage: Stage,
    tuning: Mapping[str, TuningResult],
    trials: Sequence[Trial],
    outcomes: Sequence[TrialOutcome],
) -> dict[str, TuningResult]:
    """Return the results with the settings that the trials of a stage select.

    Args:
        config: the study.
        stage: stage of the tuning that needs the trials.
        tuning: label -> result of the stages before.
        trials: configurations of the stage, of all systems.
        outcomes: their outcomes.

    Raises:
        UserError: no trial of a system finished.
    """
    by_name = {outcome.name: outcome for outcome in outcomes}
    chosen: dict[str, TuningResult] = {}
    for label, entry in config.systems.items():
        own = [trial for trial in trials if trial.settings["system"] == label]
        rows = [_describe_trial(stage, trial, by_name.get(trial.name)) for trial in own]
        # Untuned settings would make the comparison with tuned systems unfair.
        if rows and all(row["score"] is None for row in rows):
            raise UserError(f"no tuning trial of {label} finished; see {config.folder / 'tuning'}")
        result = replace(tuning[label], trials=[*tuning[label].trials, *rows])
        finished = [row for row in rows if row["score"] is not None]
        if finished and stage == "space":
            result = _choose_point(result, finished)
        elif finished:
            result = choose_rates(result, finished, RATE_KEYS[stage], entry.rate_per_task)
        chosen[label] = result
    for label, entry in config.systems.items():
        if entry.reuse_tuning_of is not None and not _has_trials(config, entry, stage):
            other = chosen[entry.reuse_tuning_of]
            settings = chosen[label].settings | other.settings
            chosen[label] = replace(chosen[label], settings=settings, score=other.score)
    return chosen


def _describe_trial(stage: Stage, trial: Trial, outcome: TrialOutcome | None) -> dict[str, Any]:
    is_finished = outcome is not None and outcome.status == "finished"
    last = outcome.reports[-1] if is_finished and outcome is not None and outcome.reports else {}
    return {
        "stage": stage,
        "settings": {key: value for key, value in trial.settings.items() if key != "system"},
        "seed": trial.config.seed,
        "status": outcome.status if outcome else "not run",
        "score": last.get("score"),
        "scores": last.get("scores", {}),
        "steps": trial.config.training.steps,
        "seconds": outcome.seconds if outcome else None,
        "commit": outcome.commit if outcome else None,
    }


def _choose_point(result: TuningResult, rows: Sequence[Mapping[str, Any]]) -> TuningResult:
    """Choose the point with the best mean score over seeds; of equal scores the first."""
    points: list[dict[str, Any]] = []
    for row in rows:
        if row["settings"] not in points:
            points.append(row["settings"])
    means = [fmean(row["score"] for row in rows if row["settings"] == point) for point in points]
    best = means.index(max(means))
    return replace(result, settings=points[best], score=means[best])


def name_task_rate(task: str) -> str:
    """Return the setting that is the learning rate of one task."""
    return f"tasks.{task}.lr"


def choose_rates(
    result: TuningResult, rows: Sequence[Mapping[str, Any]], key: str, is_per_task: bool
) -> TuningResult:
    """Return the result with a rate that a parabola chooses.

    Args:
        result: chosen settings of the stages before.
        rows: finished trials of the stage, as in :attr:`TuningResult.trials`.
        key: setting of the rate.
        is_per_task: whether each task has a rate of its own, because the tasks share no weights.
    """
    rates = [row["settings"][key] for row in rows]
    fit = fit_best_rate(rates, [row["score"] for row in rows])
    fits, score = {key: fit}, fit.score
    if key == RATE and is_per_task:
        for task in rows[0]["scores"]:
            fits[name_task_rate(task)] = fit_best_rate(rates, [row["scores"][task] for row in rows])
        score = fmean(each.score for name, each in fits.items() if name != key)
    chosen = {name: each.rate for name, each in fits.items()}
    words = {name: each.describe() for name, each in fits.items()}
    settings, words = result.settings | chosen, result.rates | words
    return replace(result, settings=settings, score=score, rates=words)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return ``training.lr 0.002, training.weight_decay 0.1``, or "as configured" for none."""
    return (
        ", ".join(f"{key} {format_setting(value)}" for key, value in settings.items())
        or "as configured"
    )
