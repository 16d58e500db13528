"""Parts of the trial engine that need no Ray cluster: resources, resumed ASHA, pruning."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from skillnet_platform.errors import UserError
from sweeps.config.trials import ResourceConfig
from sweeps.trials.engine import run_trials
from sweeps.trials.ledger import WEIGHT_FOLDERS, LedgerEntry, prune_entries
from sweeps.trials.ray_tune import ResumableASHA
from sweeps.trials.trial import Trial, TrialOutcome
from tests.helpers.small_corpora import small_config

REPORTS = [{"step": 2, "score": 0.9}, {"step": 4, "score": 0.95}]


@pytest.mark.parametrize(
    ("gpus", "use_gpu", "expected"),
    [
        (0.25, False, r"trial a: resources\.gpus is 0\.25, but training\.use_gpu is false"),
        (0.0, True, r"trial a: training\.use_gpu is true, but resources\.gpus is 0"),
    ],
)
def test_a_gpu_must_be_both_reserved_and_used(
    gpus: float, use_gpu: bool, expected: str, tmp_path: Path
) -> None:
    trial = Trial("a", small_config(tmp_path / "corpora", use_gpu=use_gpu))
    parent: Any = None
    with pytest.raises(UserError, match=expected):
        run_trials(
            [trial], folder=tmp_path / "t", parent=parent, resources=ResourceConfig(gpus=gpus)
        )
    assert not (tmp_path / "t" / "a").exists()
    ResourceConfig(gpus=gpus).check(use_gpu=not use_gpu)


def decision(halving: ResumableASHA, name: str, score: float) -> str:
    """Return the decision about a trial that reaches the first rung with a score."""
    trial: Any = SimpleNamespace(trial_id=name)
    runner: Any = None
    halving.scheduler.on_trial_add(runner, trial)
    return halving.scheduler.on_trial_result(runner, trial, {"step": 2, "score": score})


def test_asha_replays_reports_from_before_a_kill() -> None:
    fresh, gone_on = ResumableASHA(6, 2, 2.0), ResumableASHA(6, 2, 2.0)
    gone_on.replay_reports("good", REPORTS)
    gone_on.replay_reports("new", [])
    assert decision(fresh, "lame", 0.1) == TrialScheduler.CONTINUE, "it is the first"
    assert decision(gone_on, "lame", 0.1) == TrialScheduler.STOP
    assert decision(gone_on, "better", 0.99) == TrialScheduler.CONTINUE


def entry(root: Path, name: str, status: Any, score: float) -> LedgerEntry:
    """Return the ledger entry of an ended trial, with its files."""
    folder = root / name
    for heavy in WEIGHT_FOLDERS:
        (folder / heavy / "part").mkdir(parents=True)
    (folder / "evaluation.csv").touch()
    made = LedgerEntry(Trial(name, small_config(root)), folder)
    reports = [{"step": 2, "score": score}]
    made.outcome = TrialOutcome(name, name, folder, status, reports=reports)
    return made


def test_only_the_best_keep_models_and_checkpoints(tmp_path: Path) -> None:
    entries = [
        entry(tmp_path, "second", "finished", 0.5),
        entry(tmp_path, "best", "finished", 0.6),
        entry(tmp_path, "stopped", "stopped", 0.9),
        entry(tmp_path, "failed", "failed", 0.1),
        entry(tmp_path, "interrupted", "interrupted", 0.1),
    ]
    running = replace(entries[0], folder=tmp_path / "none", outcome=None)
    prune_entries([*entries, running], keep=1)
    left = {each.trial.name for each in entries if (each.folder / "checkpoints").exists()}
    assert left == {"best", "failed", "interrupted"}, (
        "trials without an end resume from their checkpoints"
    )
    assert not any((tmp_path / "second" / heavy).exists() for heavy in WEIGHT_FOLDERS)
    assert all((each.folder / "evaluation.csv").is_file() for each in entries)
    prune_entries(entries, keep=0)
    assert not (tmp_path / "best" / "model").exists()
