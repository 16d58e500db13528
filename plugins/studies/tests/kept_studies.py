"""A finished study of synthetic runs, and its kept results."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from pipelines.data.config.folds import FoldConfig
from pipelines.training.runs.layout import CONFIG
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_platform import config as configuration
from skillnet_platform.storage import read_json, write_json
from skillnet_studies.config.study import StudyConfig, SystemConfig
from skillnet_studies.study.kept_results import keep_results
from skillnet_studies.study.study import build_final_trials, write_study_ledger
from skillnet_studies.study.tuning import start_tuning
from sweeps.trials.ledger import LedgerEntry
from tests.helpers.small_corpora import small_config
from tests.helpers.synthetic_runs import complete_result, write_run

CLAIM = Claim("Skills help.", [Condition("skillnet", "specialist")])


def keep_study(
    root: Path,
    name: str,
    skills: Mapping[str, float],
    folds: int = 3,
    stated: Mapping[str, Claim] | None = None,
    **settings: str,
) -> Path:
    """Write a finished study of three folds, and keep it.

    A label in ``-long`` has three times the steps; ``settings`` are further keys of the study.
    Returns the path of the kept results.
    """
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
        claims=ClaimsConfig(stated=dict(stated or {})),
        **settings,
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
    write_study_ledger(config, start_tuning(config), outcomes)
    keep_results(config, outcomes)
    return root / "results" / name
