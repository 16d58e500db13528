"""The presets of studies beside the final one: labels, rates, budget, more steps, other models."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.runs.layout import CONFIG
from skillnet_platform import config as configuration
from skillnet_studies.compare import check_roles
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.kept_results import KeptStudy
from skillnet_studies.study.study import build_final_trials, read_study_ledger
from skillnet_studies.study.tuning import start_tuning
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


@pytest.mark.parametrize(
    ("name", "systems"),
    [
        (
            "labels",
            {"skillnet-30", "skillnet-30-pretrained", "skillnet-10", "skillnet-10-pretrained"},
        ),
        ("budget", {"skillnet", "moe", "dense"}),
        ("longer", {"skillnet-long", "specialist-long"}),
        ("longer-pretrained", {"skillnet-long-pretrained"}),
        ("equal-steps", {"skillnet-equal"}),
        ("dense", {"dense-deep", "dense-modality"}),
        ("rates", set(parse_study("final").systems)),
    ],
)
def test_studies_have_the_folds_rows_and_steps_of_the_final_one(name, systems, capsys):
    final, beside = parse_study("final"), parse_study(name)
    check_roles(beside, list(beside.systems))
    assert "nothing is tested" not in capsys.readouterr().err
    assert beside.run.fold == final.run.fold
    assert beside.run.training.steps == final.run.training.steps
    assert not beside.seal_reserve
    # Only the models of this study are tuned, with the final study's number of trials.
    assert beside.tuning.is_enabled == (name == "dense")
    assert name != "dense" or beside.tuning == final.tuning
    trials = build_final_trials(beside, start_tuning(beside))
    assert {trial.group for trial in trials} == systems
    assert len(trials) == len(systems) * 5, "five folds"
    if name == "budget":
        assert all(0 < 10 * trial.config.training.evaluate_every < 2150 for trial in trials)


def test_each_system_has_its_label_fraction_and_pretraining_reads_all_rows() -> None:
    config = parse_study("labels")
    config.claims.check_names(config.systems, config.run.tasks)
    assert set(config.claims.stated) == {"tenth of the labels", "third of the labels"}
    for trial in build_final_trials(config, start_tuning(config)):
        before = trial.pretrain
        assert (before is not None) == str(trial.group).endswith("-pretrained")
        assert before is None or {task.label_fraction for task in before.tasks.values()} == {1.0}
        wanted = 0.3 if "-30" in str(trial.group) else 0.1
        assert {task.label_fraction for task in trial.config.tasks.values()} == {wanted}


@pytest.mark.parametrize(
    ("name", "suffix", "steps"),
    [("longer", "-long", 3 * 2150), ("longer-pretrained", "-long", 3 * 2150),
     ("equal-steps", "-equal", 2200 + 2150)],
)  # fmt: skip
def test_longer_arms_differ_from_the_runs_of_rates_only_in_their_steps(name, suffix, steps):
    config, usual = parse_study(name), parse_study("rates")
    others = {trial.name: trial for trial in build_final_trials(usual, start_tuning(usual))}
    for trial in build_final_trials(config, start_tuning(config)):
        own, other = flatten_trial(trial), flatten_trial(others[trial.name.replace(suffix, "")])
        different = {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
        assert different == {"training.steps"}
        assert own["training.steps"] == steps
    # The control has as many steps as pretraining and run together.
    pretrained = others["skillnet-pretrained-fold0-seed0"]
    assert pretrained.pretrain.training.steps == 2200


def test_the_final_systems_train_again_at_the_rates_of_the_present_rule() -> None:
    config = parse_study("rates")
    chosen, kept = choose_rates_again(FINAL), KeptStudy(FINAL)
    for trial in build_final_trials(config, start_tuning(config)):
        own = flatten_trial(trial)
        # A kept run names the model of the pretraining that it started from.
        other = configuration.flatten_tree(kept.runs[trial.name][CONFIG])
        different = {key for key in own.keys() & other.keys() if own[key] != other[key]}
        assert different <= {"name", "init_from", *chosen[str(trial.group)].settings}


@pytest.mark.parametrize("name", ["labels", "budget", "longer", "rates"])
def test_settings_are_those_that_the_final_study_or_the_present_rule_chooses(name: str) -> None:
    config = parse_study(name)
    chosen = read_study_ledger(FINAL)[0] if name == "labels" else choose_rates_again(FINAL)
    for trial in build_final_trials(config, start_tuning(config)):
        label = re.sub("-(long|10|30)", "", str(trial.group))
        own, tuning = flatten_trial(trial), chosen["dense-executed" if label == "dense" else label]
        assert len(tuning.settings) >= 4
        # A preset rounds the numbers.
        rel = 1e-3 if name == "labels" else 1e-4
        for key, value in tuning.settings.items():
            assert own[key] == (value if isinstance(value, str) else pytest.approx(value, rel=rel))
