"""Blocks of the page of results: which studies they need, and what they show."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config.folds import FoldConfig
from pipelines.runs.layout import CONFIG
from skillnet_platform import config as configuration
from skillnet_platform.storage import read_json, write_json
from sweeps.config.claims import ClaimPart, ClaimsConfig, StatedClaim
from sweeps.config.study import StudyConfig, SystemConfig
from sweeps.study.kept_results import keep_results
from sweeps.study.reserve import RESERVE_RECORD
from sweeps.study.study import StudyResult, build_final_trials, write_study_ledger
from sweeps.study.tuning import start_tuning
from sweeps.trials.ledger import LedgerEntry
from sweeps.trials.remote_ledger import STUDY_LEDGER
from tests.helpers.small_corpora import small_config
from tests.helpers.synthetic_runs import complete_result, write_run
from tools.docs import study_tables
from tools.docs.page_marks import between
from tools.docs.study_tables import BLOCKS, NOT_COMPLETE, PAGE, StudyBlock, render_block

CLAIM = StatedClaim("Skills help.", [ClaimPart("skillnet", "specialist")])
FINAL = StudyBlock(("final",), BLOCKS["final"].tables)
LONGER = replace(BLOCKS["longer"], tables=(*BLOCKS["longer"].tables, study_tables.SCORES))


def keep_study(root: Path, name: str, skills: dict[str, float], folds: int = 3) -> Path:
    """Write a finished study of synthetic runs, and keep it."""
    config = StudyConfig(
        name=name,
        run_dir=str(root / "runs"),
        keep=str(root / "results"),
        seeds=[0],
        folds=folds,
        run=replace(small_config(root / "corpora"), fold=FoldConfig(3)),
        systems={
            label: SystemConfig(label.removesuffix("-long"), steps_factor=1 + 2 * ("long" in label))
            for label in skills
        },
        claims=ClaimsConfig(stated={"skills": CLAIM} if name == "final" else {}),
    )
    outcomes = []
    for trial in build_final_trials(config, start_tuning(config)):
        own = trial.config
        folder = write_run(
            config.folder / "runs" / trial.name, own.system, own.seed, skills[str(trial.group)]
        )
        (folder / CONFIG).write_text(configuration.to_yaml(own), encoding="utf-8")
        trained = folder / "trained.json"
        write_json(trained, read_json(trained) | {"step": own.training.steps})
        complete_result(folder)
        outcomes.append(LedgerEntry(trial, folder).build_outcome("finished"))
    write_study_ledger(StudyResult(config, start_tuning(config), outcomes), config.folder)
    keep_results(config, outcomes)
    return root / "results" / name


def test_a_block_shows_the_answer_and_its_tables(tmp_path: Path) -> None:
    folder = keep_study(tmp_path, "final", {"skillnet": 0.5, "specialist": 0.0, "moe": 0.4})
    text = render_block(FINAL, tmp_path / "results")
    assert "Skills help" in text.splitlines()[0]
    assert "3 systems, 3 replicates each, 5 tasks, 9 runs. runs at commit 0123456789ab" in text
    titles = [line.strip("*") for line in text.splitlines() if line.startswith("**")]
    assert titles == ["Claims", study_tables.SCORES, study_tables.DIFFERENCES, "Cost"]
    assert "| moe − skillnet |" in text
    # The text depends on the kept files alone.
    assert render_block(FINAL, tmp_path / "results") == text
    assert "report at commit" not in text
    # Nobody looks at a part of a study, or at a reserve that was not opened.
    reserve = replace(FINAL, is_reserve=True)
    assert render_block(reserve, tmp_path / "results") == NOT_COMPLETE
    write_json(folder / RESERVE_RECORD, {"reads": [{"finished": None}]})
    assert render_block(reserve, tmp_path / "results") == NOT_COMPLETE
    ledger = json.loads((folder / STUDY_LEDGER).read_text())
    write_json(folder / STUDY_LEDGER, ledger | {"runs": ledger["runs"][:-1]})
    assert render_block(FINAL, tmp_path / "results") == NOT_COMPLETE


def test_runs_of_two_studies_are_compared_on_the_folds_that_they_share(tmp_path: Path) -> None:
    keep_study(tmp_path, "final", {"skillnet": 0.5, "specialist": 0.0, "moe": 0.4})
    results = tmp_path / "results"
    assert render_block(LONGER, results) == NOT_COMPLETE, "the other study is missing"
    keep_study(tmp_path, "longer", {"skillnet-long": 0.5, "specialist-long": 0.5}, folds=2)
    text = render_block(LONGER, results)
    assert "4 systems, 2 replicates each, 5 tasks, 8 runs" in text
    assert "| systems | task | 12 steps | 36 steps | change |" in text
    assert "moe" not in text


@pytest.mark.parametrize("name", BLOCKS)
def test_the_page_shows_what_the_kept_studies_give(name: str) -> None:
    assert between(PAGE, name) == render_block(BLOCKS[name])
