"""The presets of studies beside the final one: labels, rates, budget, more steps, other models."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.training.runs.layout import CONFIG
from skillnet_platform import config as configuration
from skillnet_studies.compare import check_roles
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.kept_results import KeptStudy
from skillnet_studies.study.study import build_final_trials, read_study_ledger
from skillnet_studies.study.tuning import TuningResult, start_tuning
from sweeps.trials.trial import Trial
from tools.docs.study_rates import choose_rates_again

FINAL = Path(__file__).parents[3] / "lab/results/final"


def parse_study(name: str) -> StudyConfig:
    return configuration.parse_config(StudyConfig, ["--config", f"studies/{name}"], "skillnet")


def flatten_trial(trial: Trial) -> dict[str, Any]:
    """Return the flat settings of a trial; those of its pretraining start with ``pretraining.``."""
    flat = configuration.flatten_tree(configuration.to_dict(trial.config))
    before = {} if trial.pretrain is None else configuration.to_dict(trial.pretrain)
    flat_before = configuration.flatten_tree(before)
    return flat | {f"pretraining.{key}": value for key, value in flat_before.items()}


def check_settings(trial: Trial, tuning: TuningResult, rel: float) -> None:
    """Assert that a trial has tuned settings, whose numbers a preset rounds."""
    own = flatten_trial(trial)
    assert len(tuning.settings) >= 4
    for key, value in tuning.settings.items():
        assert own[key] == (value if isinstance(value, str) else pytest.approx(value, rel=rel))


def test_each_system_has_its_label_fraction_and_pretraining_reads_all_rows() -> None:
    config = parse_study("labels")
    config.claims.check_names(config.systems, config.run.tasks)
    assert set(config.claims.stated) == {"tenth of the labels", "third of the labels"}
    trials = build_final_trials(config, start_tuning(config))
    assert len(trials) == 4 * 5, "five folds"
    found = set()
    for trial in trials:
        before = trial.pretrain
        assert before is None or {task.label_fraction for task in before.tasks.values()} == {1.0}
        fractions = {task.label_fraction for task in trial.config.tasks.values()}
        found.add((trial.group, *fractions, before is not None))
    assert found == {
        ("skillnet-30", 0.3, False),
        ("skillnet-30-pretrained", 0.3, True),
        ("skillnet-10", 0.1, False),
        ("skillnet-10-pretrained", 0.1, True),
    }


def test_the_budget_is_measured_by_curves_of_three_systems() -> None:
    config = parse_study("budget")
    trials = build_final_trials(config, start_tuning(config))
    assert {trial.group for trial in trials} == {"skillnet", "moe", "dense"}
    assert len(trials) == 3 * 5, "five folds"
    assert all(0 < 10 * trial.config.training.evaluate_every < 2150 for trial in trials)


@pytest.mark.parametrize(
    ("name", "systems"),
    [
        ("longer", {"skillnet-long", "specialist-long"}),
        ("longer-pretrained", {"skillnet-long-pretrained"}),
    ],
)
def test_longer_arms_differ_from_the_runs_of_rates_only_in_their_steps(
    name: str, systems: set[str]
) -> None:
    config, usual = parse_study(name), parse_study("rates")
    trials = build_final_trials(config, start_tuning(config))
    assert {trial.group for trial in trials} == systems
    assert len(trials) == len(systems) * 5, "five folds"
    others = {trial.name: trial for trial in build_final_trials(usual, start_tuning(usual))}
    for trial in trials:
        own, other = flatten_trial(trial), flatten_trial(others[trial.name.replace("-long", "")])
        different = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
        assert different == {"training.steps"}
        assert own["training.steps"] == 3 * other["training.steps"]


def test_the_control_has_as_many_steps_as_pretraining_and_the_usual_run() -> None:
    config, usual = parse_study("equal-steps"), parse_study("rates")
    trials = build_final_trials(config, start_tuning(config))
    others = {trial.name: trial for trial in build_final_trials(usual, start_tuning(usual))}
    assert len(trials) == 5, "five folds"
    for trial in trials:
        own, other = flatten_trial(trial), flatten_trial(others[trial.name.replace("-equal", "")])
        different = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
        assert different == {"training.steps"}
        with_pretraining = others[trial.name.replace("-equal", "-pretrained")]
        assert with_pretraining.pretrain is not None
        before, after = (
            each.training.steps for each in (with_pretraining.pretrain, with_pretraining.config)
        )
        assert own["training.steps"] == before + after == 4350


def test_other_dense_models_are_tuned_as_the_systems_of_the_final_study() -> None:
    config = parse_study("dense")
    assert config.tuning == parse_study("final").tuning
    assert {entry.options["size"] for entry in config.systems.values()} == {"executed"}
    trials = build_final_trials(config, start_tuning(config))
    assert {trial.group for trial in trials} == {"dense-deep", "dense-modality"}
    assert len(trials) == 2 * 5, "five folds"


def test_the_final_systems_train_again_at_the_rates_of_the_present_rule() -> None:
    config = parse_study("rates")
    chosen, kept = choose_rates_again(FINAL), KeptStudy(FINAL)
    assert list(config.systems) == list(parse_study("final").systems)
    trials = build_final_trials(config, start_tuning(config))
    assert len(trials) == len(config.systems) * 5, "five folds"
    for trial in trials:
        own = flatten_trial(trial)
        # A kept run names the model of the pretraining that it started from.
        other = configuration.flatten_tree(kept.runs[trial.name][CONFIG])
        different = {key for key in own.keys() & other.keys() if own[key] != other[key]}
        assert different <= {"name", "init_from", *chosen[str(trial.group)].settings}


@pytest.mark.parametrize(
    "name", ["labels", "budget", "longer", "longer-pretrained", "equal-steps", "dense", "rates"]
)
def test_rows_and_steps_are_those_of_the_final_study_without_its_reserve(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    final, beside = parse_study("final"), parse_study(name)
    check_roles(beside, list(beside.systems))
    assert "nothing is tested" not in capsys.readouterr().err
    assert beside.run.fold == final.run.fold
    assert beside.run.training.steps == final.run.training.steps
    assert not beside.seal_reserve
    assert beside.tuning.is_enabled == (name == "dense")


def test_few_labels_have_the_settings_that_the_final_study_chose() -> None:
    config = parse_study("labels")
    chosen, _ = read_study_ledger(FINAL)
    for trial in build_final_trials(config, start_tuning(config)):
        label = trial.config.system + ("-pretrained" if trial.pretrain is not None else "")
        check_settings(trial, chosen[label], rel=1e-3)


@pytest.mark.parametrize("name", ["budget", "longer", "rates"])
def test_settings_are_those_that_the_present_rule_chooses(name: str) -> None:
    config = parse_study(name)
    chosen = choose_rates_again(FINAL)
    labels = {"dense": "dense-executed"}
    for trial in build_final_trials(config, start_tuning(config)):
        label = str(trial.group).removesuffix("-long")
        check_settings(trial, chosen[labels.get(label, label)], rel=1e-4)
