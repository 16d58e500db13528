"""A trial that ended keeps its place in a sweep only if its corpora are still the same."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config.run import PretrainConfig
from pipelines.training.loop.resolved_run import resolve_run
from pipelines.training.runs.layout import CONFIG, RESULT
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from sweeps.config.trials import ResourceConfig
from sweeps.trials.engine import run_trials
from sweeps.trials.ledger import LedgerEntry
from sweeps.trials.trial import OUTCOME, Trial
from tests.helpers.small_corpora import small_config, write_corpora

BEFORE = "0" * 64
ENDS: dict[str, dict[str, Any]] = {
    RESULT: {"step": 4, "seconds": 1.0, "model": "", "name": "a", "evaluation": []},
    OUTCOME: {"status": "stopped", "error": None, "score": 0.5, "step": 4},
}


@pytest.fixture
def trial(tmp_path: Path, run_root: Path) -> Trial:
    data = write_corpora(tmp_path / "data")
    return Trial("a", resolve_run(replace(small_config(data, steps=4), name="a")).config)


def end_trial(trial: Trial, folder: Path, end: str, corpora: dict[str, str | None]) -> None:
    """Write the files of a trial that ended on given corpora."""
    folder.mkdir(parents=True)
    config = replace(trial.config, corpora=corpora)
    (folder / CONFIG).write_text(configuration.to_yaml(config), encoding="utf-8")
    (folder / end).write_text(json.dumps(ENDS[end]))


@pytest.mark.parametrize("end", list(ENDS))
def test_a_trial_that_ended_on_another_corpus_is_refused_with_both_digests(trial, tmp_path, end):
    now = trial.config.corpora["headings"]
    end_trial(trial, tmp_path / "a", end, trial.config.corpora | {"headings": BEFORE})
    with pytest.raises(UserError, match=f"corpora.headings is {BEFORE} in .*, and {now} below"):
        LedgerEntry(trial, tmp_path / "a").load_settled()


@pytest.mark.parametrize("end", list(ENDS))
def test_a_trial_that_ended_on_the_same_corpora_is_not_repeated(trial, tmp_path, end):
    end_trial(trial, tmp_path / "a", end, trial.config.corpora)
    assert LedgerEntry(trial, tmp_path / "a").load_settled() is not None


def test_a_trial_with_a_pretraining_is_refused_before_anything_starts(trial, tmp_path):
    end_trial(trial, tmp_path / "t" / "a", RESULT, trial.config.corpora | {"headings": BEFORE})
    parent: Any = None
    pretrained = replace(trial, pretrain=PretrainConfig())
    with pytest.raises(UserError, match=f"trial a: .* corpora.headings is {BEFORE} in"):
        run_trials([pretrained], folder=tmp_path / "t", parent=parent, resources=ResourceConfig())
