"""The preset of a study with few labels: systems differ in their labels and their pretraining."""

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


def test_each_system_has_its_label_fraction_and_pretraining_reads_all_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = parse_study("labels")
    config.claims.check_names(config.systems, config.run.tasks)
    check_roles(config, list(config.systems))
    assert "nothing is tested" not in capsys.readouterr().err
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


def test_rows_and_steps_are_those_of_the_final_study_without_its_reserve() -> None:
    final, labels = parse_study("final"), parse_study("labels")
    assert labels.run.fold == final.run.fold
    assert labels.run.training.steps == final.run.training.steps
    assert not labels.seal_reserve
    assert not labels.tuning.is_enabled


def test_settings_are_those_that_the_final_study_chose() -> None:
    config = parse_study("labels")
    chosen, _ = read_study_ledger(FINAL)
    for trial in build_final_trials(config, start_tuning(config)):
        flat = configuration.flatten_tree(configuration.to_dict(trial.config))
        if trial.pretrain is not None:
            flat["pretraining.training.lr"] = trial.pretrain.training.lr
        suffix = "-pretrained" if trial.pretrain is not None else ""
        settings = chosen[f"skillnet{suffix}"].settings
        assert len(settings) >= 4
        for key, value in settings.items():
            assert flat[key] == (
                value if isinstance(value, str) else pytest.approx(value, rel=1e-3)
            )
