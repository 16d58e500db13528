"""The presets of studies beside the final one: labels, budget, more steps, other dense models."""

from pathlib import Path

import pytest

from skillnet_platform import config as configuration
from sweeps.compare import check_roles
from sweeps.config.study import StudyConfig
from sweeps.study.study import build_final_trials, read_study_ledger
from sweeps.study.tuning import start_tuning

FINAL = Path(__file__).parents[3] / "benchmarks/results/final"


def parse_study(name: str) -> StudyConfig:
    return configuration.parse_config(StudyConfig, ["--config", f"studies/{name}"], "skillnet")


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


def test_longer_arms_differ_from_the_final_runs_only_in_their_steps() -> None:
    config = parse_study("longer")
    trials = build_final_trials(config, start_tuning(config))
    assert {trial.group for trial in trials} == {"skillnet-long", "specialist-long"}
    assert len(trials) == 2 * 5, "five folds"
    for trial in trials:
        kept = FINAL / "runs" / trial.name.replace("-long", "") / "config.yaml"
        own = configuration.flatten_tree(configuration.to_dict(trial.config))
        other = configuration.flatten_tree(configuration.load_yaml(kept))
        # A finished run has further keys, such as the digests of its corpora.
        different = {key for key in own.keys() & other.keys() if own[key] != other[key]}
        assert different == {"name", "training.steps"}
        assert own["training.steps"] == 3 * other["training.steps"]


def test_other_dense_models_are_tuned_as_the_systems_of_the_final_study() -> None:
    config = parse_study("dense")
    assert config.tuning == parse_study("final").tuning
    assert {entry.options["size"] for entry in config.systems.values()} == {"executed"}
    trials = build_final_trials(config, start_tuning(config))
    assert {trial.group for trial in trials} == {"dense-deep", "dense-modality"}
    assert len(trials) == 2 * 5, "five folds"


@pytest.mark.parametrize("name", ["labels", "budget", "longer", "dense"])
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


@pytest.mark.parametrize("name", ["labels", "budget", "longer"])
def test_settings_are_those_that_the_final_study_chose(name: str) -> None:
    config = parse_study(name)
    chosen, _ = read_study_ledger(FINAL)
    labels = {"dense": "dense-executed"}
    for trial in build_final_trials(config, start_tuning(config)):
        flat = configuration.flatten_tree(configuration.to_dict(trial.config))
        if trial.pretrain is not None:
            flat["pretraining.training.lr"] = trial.pretrain.training.lr
        suffix = "-pretrained" if trial.pretrain is not None else ""
        system = trial.config.system
        settings = chosen[labels.get(system, system) + suffix].settings
        assert len(settings) >= 4
        for key, value in settings.items():
            assert flat[key] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
            )
