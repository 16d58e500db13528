"""Learning rates of a study: the top of a parabola, per system and for tasks that share nothing."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.data.config.folds import FoldConfig
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig, SystemConfig, TuningConfig
from skillnet_studies.study import tuning as tn
from skillnet_studies.study.study import build_final_trial
from skillnet_studies.study.system_runs import build_base_run
from skillnet_studies.study.tuning import fit_best_rate
from sweeps.trials.trial import Trial, TrialOutcome
from tests.helpers.small_corpora import small_config

RATES = [2e-4, 4e-4, 8e-4, 1.6e-3, 3.2e-3]


def parabola(rates: list[float], top: float, width: float = 1.0) -> list[float]:
    return [0.5 - width * math.log(rate / top) ** 2 / 10 for rate in rates]


@pytest.mark.parametrize(
    ("rates", "scores", "top"),
    [
        (RATES * 2, parabola(RATES * 2, 1.1e-3), 1.1e-3),
        # Training fails at the highest rate.
        (RATES, [*parabola(RATES, 1.1e-3)[:4], 0.0], 1.1e-3),
        # Neighbours of the lowest rate are the next two.
        (RATES, parabola(RATES, 2.2e-4), 2.2e-4),
        (RATES[1:4], parabola(RATES[1:4], 1e-3), 1e-3),
    ],
)
def test_the_top_of_a_parabola_is_found_between_the_rates(rates, scores, top):
    fit = fit_best_rate(rates, scores)
    assert (fit.rate, fit.score) == (pytest.approx(top), pytest.approx(0.5))
    assert not fit.note
    if len(rates) == 3:
        assert "error unknown" in fit.describe()
    elif len(rates) > 5:
        assert fit.low == pytest.approx(fit.high) == pytest.approx(top)


def test_the_error_is_the_spread_of_the_top_over_repeated_trials() -> None:
    random, tops, errors = np.random.default_rng(0), [], []
    rates = [rate for rate in RATES for _ in range(2)]
    for _ in range(400):
        scores = np.array(parabola(rates, 1e-3)) + random.normal(0, 0.02, len(rates))
        fit = fit_best_rate(rates, scores.tolist())
        assert not fit.note
        assert fit.low is not None
        assert fit.high is not None
        tops.append(math.log(fit.rate))
        errors.append(math.log(fit.high / fit.low) / 2)
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(tops), rel=0.15)
    assert np.mean(tops) == pytest.approx(math.log(1e-3), abs=0.02)


@pytest.mark.parametrize(
    ("rates", "scores", "rate", "note"),
    [
        (RATES, parabola(RATES, 1e-2), 3.2e-3, "outside of the tried rates"),
        (RATES, [0.5, 0.3, 0.1, 0.3, 0.6], 3.2e-3, "no top"),
        ([1e-3, 2e-3], [0.4, 0.3], 1e-3, "fewer than three"),
        ([1e-3], [0.4], 1e-3, "fewer than three"),
    ],
)
def test_the_best_trial_is_taken_where_no_parabola_has_a_top(rates, scores, rate, note):
    fit = fit_best_rate(rates, scores)
    assert fit.rate == rate
    assert note in fit.note
    assert (fit.low, fit.high) == (None, None)
    assert note in fit.describe()


def study(**systems: SystemConfig) -> StudyConfig:
    tuning = TuningConfig(
        rates=RATES, pretraining_rates=RATES[1:4], seeds=[77, 78], step_fraction=0.75
    )
    run = small_config(Path("corpora"))
    return StudyConfig(name="s", seeds=[0, 1], run=run, systems=systems, tuning=tuning)


def outcome(trial: Trial, scores: dict[str, float]) -> TrialOutcome:
    report = {"step": 9, "score": sum(scores.values()) / len(scores), "scores": scores}
    result = {"step": 9, "seconds": 1.0}
    return TrialOutcome(
        trial.name, str(trial.group), Path(trial.name), "finished", result, [report]
    )


def tune(config: StudyConfig, scores_of: Any) -> dict[str, tn.TuningResult]:
    tuning = tn.start_tuning(config)
    for stage in tn.STAGES:
        trials = tn.build_stage_trials(config, stage, tuning)
        if trials:
            done = [outcome(trial, scores_of(trial)) for trial in trials]
            tuning = tn.choose_settings(config, stage, tuning, trials, done)
    return tuning


def test_each_system_tunes_the_rates_of_pretraining_and_run() -> None:
    config = study(
        skillnet=SystemConfig("skillnet"),
        pretrained=SystemConfig("skillnet", pretrain=True, reuse_tuning_of="skillnet"),
        long=SystemConfig("skillnet", reuse_tuning_of="skillnet", steps_factor=3),
    )

    def scores_of(trial: Trial) -> dict[str, float]:
        # Steps and seeds of all trials; a pretrained system prefers half of the rate.
        assert trial.config.training.steps == 9
        assert trial.config.seed in (77, 78)
        own = trial.config.training.lr
        if trial.pretrain is None:
            return {"a": parabola([own], 1e-3)[0]}
        first = trial.pretrain.training.lr
        if trial.name.startswith("pretrained-p"):
            return {"a": parabola([first], 7e-4)[0]}
        assert first == pytest.approx(7e-4)
        return {"a": parabola([own], 5e-4)[0]}

    tuning = tune(config, scores_of)
    assert tuning["skillnet"].settings == {"training.lr": pytest.approx(1e-3)}
    assert tuning["pretrained"].settings == {
        "pretraining.training.lr": pytest.approx(7e-4),
        "training.lr": pytest.approx(5e-4),
    }
    assert tuning["long"].settings == tuning["skillnet"].settings
    assert [len(each.trials) for each in tuning.values()] == [10, 16, 0]
    final = build_final_trial(config, "pretrained", tuning["pretrained"].settings, 1)
    rates = (final.pretrain.training.lr, final.config.training.lr)
    assert rates == (pytest.approx(7e-4), pytest.approx(5e-4))
    assert build_final_trial(config, "long", {}, 1).config.training.steps == 36


def test_each_seed_of_a_trial_has_the_validation_rows_of_another_fold() -> None:
    config = study(skillnet=SystemConfig("skillnet"))
    folds = replace(config, run=replace(config.run, fold=FoldConfig(count=5, number=3)))
    trials = tn.build_stage_trials(folds, "rates", tn.start_tuning(folds))
    assert [trial.config.fold.number for trial in trials] == [0, 1] * len(RATES)
    # Folds that the study does not test come first.
    some = replace(folds, folds=3)
    trials = tn.build_stage_trials(some, "rates", tn.start_tuning(some))
    assert [trial.config.fold.number for trial in trials] == [3, 4] * len(RATES)


def test_tasks_that_share_no_weights_have_each_their_rate() -> None:
    config = study(specialist=SystemConfig("specialist", rate_per_task=True))
    tops = {"text_classification": 5e-4, "text_to_image": 2e-3}

    def scores_of(trial: Trial) -> dict[str, float]:
        rate = trial.config.training.lr
        return {task: parabola([rate], top)[0] for task, top in tops.items()}

    own = tune(config, scores_of)["specialist"]
    chosen = {key: own.settings[f"tasks.{key}.lr"] for key in tops}
    assert chosen == {key: pytest.approx(top) for key, top in tops.items()}
    assert own.score == pytest.approx(0.5)
    assert "5e-04" in own.rates["tasks.text_classification.lr"].replace("0.0005", "5e-04")
    final = build_final_trial(config, "specialist", own.settings, 0).config
    assert final.tasks["text_to_image"].lr == pytest.approx(2e-3)


def test_a_rate_per_task_needs_tasks_that_share_no_weights() -> None:
    config = study(dense=SystemConfig("dense", rate_per_task=True))
    with pytest.raises(UserError, match=r"systems\.dense\.rate_per_task: the tasks of dense share"):
        build_base_run(config, "dense", 0)
    config = study(alone=SystemConfig("alone", rate_per_task=True))
    run = build_base_run(config, "alone", 0)
    given = replace(
        config, systems={"alone": SystemConfig("alone", set={"tasks.text_to_image.lr": 0.1})}
    )
    assert build_base_run(given, "alone", 0).tasks["text_to_image"].lr == 0.1
    assert run.tasks["text_to_image"].lr is None
