"""What of the engine of sweeps needs no Ray: resources, halving after a kill, what is kept."""

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
def test_a_gpu_is_asked_for_and_used_or_neither(
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
    """What becomes of a trial that reaches the first rung with that score."""
    trial: Any = SimpleNamespace(trial_id=name)
    runner: Any = None
    halving.scheduler.on_trial_add(runner, trial)
    return halving.scheduler.on_trial_result(runner, trial, {"step": 2, "score": score})


def test_halving_remembers_what_was_reported_before_a_kill() -> None:
    fresh, gone_on = ResumableASHA(6, 2, 2.0), ResumableASHA(6, 2, 2.0)
    gone_on.replay_reports("good", REPORTS)
    gone_on.replay_reports("new", [])
    assert decision(fresh, "lame", 0.1) == TrialScheduler.CONTINUE, "it is the first"
    assert decision(gone_on, "lame", 0.1) == TrialScheduler.STOP
    assert decision(gone_on, "better", 0.99) == TrialScheduler.CONTINUE


def entry(root: Path, name: str, status: Any, score: float) -> LedgerEntry:
    """A trial that has ended, and what it left."""
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
    assert left == {"best", "failed", "interrupted"}, "what did not end goes on from there"
    assert not any((tmp_path / "second" / heavy).exists() for heavy in WEIGHT_FOLDERS)
    assert all((each.folder / "evaluation.csv").is_file() for each in entries)
    prune_entries(entries, keep=0)
    assert not (tmp_path / "best" / "model").exists()
