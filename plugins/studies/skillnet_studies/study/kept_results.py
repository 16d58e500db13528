"""Results of a study that outlive its machine: a study's directory without weights and rows.

<keep>/<study>/
  study.yaml, study.json     configuration and tuning, without paths of the machine
  tuning.jsonl               scores and commits of finished tuning trials, one per line
  notice.txt                 limits that were found later, written by hand; reports show them
  equal_versions.json        versions of a corpus that differ by rounding errors alone
  runs/<run>/                a finished run
    config.yaml, trained.json, result.json, evaluation.csv
    unit_sums.parquet        sums of the outcomes of each unit: all that the tests need
    progress.jsonl           validation scores, of a run that computes them while it trains
    reserve_sums.parquet, reserve.csv
                             the same on the reserve, which ``--read_reserve once`` opens
    pretraining/             configuration and training time of its pretraining

A few kilobytes per run, to be committed as runs finish. :class:`KeptTuning` writes a line after
each tuning trial, :func:`keep_results` the others after each replicate. A study on another machine
takes both over and runs only what is missing. ``skillnet compare <keep>/<study>`` reads them as a
study.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.outcomes import (
    OUTCOMES_FILE,
    UNIT_SUMS_FILE,
    OutcomeTable,
    read_outcomes,
    sum_outcomes,
    write_outcomes,
)
from pipelines.training.evaluation.tables import name_metric
from pipelines.training.runs.layout import CONFIG, RESULT, TRAINED, read_result
from pipelines.training.runs.progress_log import PROGRESS, read_metric_history
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, read_json, write_json
from skillnet_studies.analysis.equal_versions import EQUAL_VERSIONS
from skillnet_studies.config.study import StudyConfig
from skillnet_studies.study.identity import find_study_difference
from sweeps.trials.remote_ledger import NOTICE, STUDY_FILE, STUDY_LEDGER
from sweeps.trials.trial import Trial, TrialOutcome

EVALUATION = "evaluation.csv"
#: Results on the reserve, in the directory of a final run. Only skillnet_studies.study.reserve
#: reads them.
RESERVE_SUMS, RESERVE_ROWS = "reserve_sums.parquet", "reserve.csv"
TUNING = "tuning.jsonl"
#: Entries of a line of it.
TUNING_KEYS = ("name", "settings", "score", "scores", "step", "seconds")
#: Directory of a kept run, and the place of its initial weights.
PRETRAINING = "pretraining"
#: Entries of a result that mean something on another machine.
RESULT_KEYS = (
    "name", "step", "seconds", "resumed", "world", "rows_per_second", "evaluation", "total_params",
    "corpora",
)  # fmt: skip


def keep_results(config: StudyConfig, outcomes: Sequence[TrialOutcome]) -> None:
    """Copy the ledger and the finished runs that are not kept yet.

    Args:
        config: the study, with ``keep``.
        outcomes: outcomes of final runs.
    """
    kept = find_kept_folder(config)
    for outcome in outcomes:
        target = kept / "runs" / outcome.name
        if outcome.status == "finished" and not target.is_dir():
            keep_run(outcome.folder, target)
    _keep_config(config)
    shutil.copyfile(config.folder / STUDY_LEDGER, kept / STUDY_LEDGER)


class KeptTuning:
    """Scores of the tuning trials of a study with ``keep``; without it nothing is kept or found.

    Args:
        config: the study.

    Raises:
        UserError: a line is damaged.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._path = find_kept_folder(config) / TUNING if config.keep else None
        self._lines: dict[str, dict[str, Any]] = {}
        if self._path is None or not self._path.is_file():
            return
        for number, text in enumerate(self._path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                line = json.loads(text)
                # The lines of the final study and of studies/dense name no commit.
                known = {"commit": line.get("commit")}
                self._lines[line["name"]] = {key: line[key] for key in TUNING_KEYS} | known
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self._path}, line {number}: not the record of a trial. Remove the line; "
                    "the trial then runs again"
                ) from error

    def find_outcome(self, trial: Trial) -> TrialOutcome | None:
        """Return the outcome of a trial with these settings; None if it must run.

        Args:
            trial: of the tuning.
        """
        folder = self._config.folder / "tuning" / trial.name
        line = self._lines.get(trial.name)
        # The run on this machine has all files, also those that are not kept.
        if line is None or line["settings"] != dict(trial.settings) or folder.is_dir():
            return None
        return TrialOutcome(
            name=trial.name,
            group=trial.group or trial.name,
            folder=folder,
            status="finished",
            result={key: line[key] for key in ("step", "seconds", "commit")},
            reports=[{"step": line["step"], "score": line["score"], "scores": line["scores"]}],
            settings=dict(trial.settings),
            seed=trial.config.seed,
        )

    def keep_outcome(self, outcome: TrialOutcome) -> None:
        """Write the scores of a finished trial; a trial that is kept already stays as it is.

        Args:
            outcome: of a tuning trial.
        """
        if self._path is None or outcome.status != "finished" or not outcome.reports:
            return
        known = self._lines.get(outcome.name)
        if known is not None and known["settings"] == outcome.settings:
            return
        self._lines[outcome.name] = {
            "name": outcome.name,
            "settings": outcome.settings,
            "score": outcome.score,
            "scores": outcome.reports[-1]["scores"],
            "step": outcome.step,
            "seconds": outcome.seconds,
            "commit": outcome.commit,
        }
        _keep_config(self._config)
        with atomic_write(self._path, "w") as stream:
            stream.writelines(f"{json.dumps(line)}\n" for line in self._lines.values())


def keep_run(run: Path, target: Path) -> None:
    """Copy a finished run without weights, rows and paths of this machine.

    Args:
        run: run directory.
        target: new directory.
    """
    # Renamed at the end: a directory with the final name is complete.
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    config = configuration.build_config(FinetuneConfig, configuration.load_yaml(run / CONFIG))
    if config.init_from:
        start = Path(config.init_from)
        _keep_pretraining(start if (start / CONFIG).is_file() else start.parent, part / PRETRAINING)
    init_from = PRETRAINING if config.init_from else None
    _write_config(replace(_remove_places(config), init_from=init_from), part / CONFIG)
    sealed = [name for name in (RESERVE_ROWS, RESERVE_SUMS) if (run / name).is_file()]
    _keep_trained(run, part)
    _keep_curves(run / PROGRESS, part / PROGRESS)
    for name in (EVALUATION, *sealed):
        shutil.copyfile(run / name, part / name)
    result = read_result(run / RESULT)
    known = {key: result[key] for key in RESULT_KEYS if key in result}
    write_json(part / RESULT, known | {"model": "not kept"})
    if (run / UNIT_SUMS_FILE).is_file():
        shutil.copyfile(run / UNIT_SUMS_FILE, part / UNIT_SUMS_FILE)
    else:
        write_outcomes(sum_table(read_outcomes(run / OUTCOMES_FILE)), part / UNIT_SUMS_FILE)
    part.rename(target)


def sum_table(outcomes: OutcomeTable) -> OutcomeTable:
    """Return the sums of each unit, for each task and split.

    Args:
        outcomes: of each row.
    """
    sums = OutcomeTable()
    for task, split in outcomes:
        part = sum_outcomes(outcomes[task, split])
        sums.add(task, split, part.numerator, part.denominator, part.rank, part.unit)
    return sums


def restore_results(config: StudyConfig) -> set[str]:
    """Copy kept results into the study's directory, where they count as finished runs.

    Args:
        config: the study.

    Returns:
        Names of the kept runs.

    Raises:
        UserError: the kept results are of a study with other settings.
    """
    kept = find_kept_folder(config) if config.keep else None
    if kept is None or not (kept / STUDY_FILE).is_file():
        return set()
    difference = find_study_difference(kept / STUDY_FILE, config)
    if difference:
        raise UserError(
            f"keep: {kept} has the results of a study with {difference}. Give another --name, or "
            "another directory"
        )
    if not (kept / STUDY_LEDGER).is_file():
        return set()
    if not (config.folder / STUDY_LEDGER).is_file():
        config.folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept / STUDY_LEDGER, config.folder / STUDY_LEDGER)
    for name in (EQUAL_VERSIONS, NOTICE):
        if (kept / name).is_file():
            shutil.copyfile(kept / name, config.folder / name)
    names = {path.parent.name for path in kept.glob(f"runs/*/{RESULT}")}
    for name in names:
        run = config.folder / "runs" / name
        if not (run / RESULT).is_file():
            # A part of the run that was lost would not fit the kept files.
            shutil.rmtree(run, ignore_errors=True)
            shutil.copytree(kept / "runs" / name, run)
    return names


def is_kept_run(run: Path) -> bool:
    """Return whether a run directory was restored from kept results."""
    return (run / UNIT_SUMS_FILE).is_file()


def find_kept_folder(config: StudyConfig) -> Path:
    """Return the directory of a study's kept results."""
    return Path(str(config.keep)).expanduser() / str(config.name)


def _keep_config(config: StudyConfig) -> None:
    portable = replace(config, run_dir=None, keep=None, output=None)
    portable.run = _remove_places(config.run)
    portable.pretraining = _remove_places(config.pretraining)
    portable.tracking = replace(config.tracking, uri=None)
    with atomic_write(find_kept_folder(config) / STUDY_FILE, "w") as stream:
        stream.write(configuration.to_yaml(portable))


def _keep_pretraining(start: Path, target: Path) -> None:
    if not (start / CONFIG).is_file():
        return
    target.mkdir()
    before = configuration.build_config(FinetuneConfig, configuration.load_yaml(start / CONFIG))
    _write_config(replace(_remove_places(before), init_from=None), target / CONFIG)
    if (start / TRAINED).is_file():
        _keep_trained(start, target)


def _keep_trained(run: Path, target: Path) -> None:
    # The checkpoints are not kept, and their path is one of this machine.
    write_json(target / TRAINED, read_json(run / TRAINED) | {"checkpoint": None})


def _keep_curves(progress: Path, target: Path) -> None:
    """Write the validation scores of a run, from which its report computes budgets."""
    validation = name_metric("", "validation", "")  # what the names of all tasks contain
    steps: dict[int, dict[str, float]] = {}
    for name, points in read_metric_history(progress).items():
        if validation in name:
            for step, value in points:
                steps.setdefault(step, {})[name] = value
    if steps:
        with atomic_write(target, "w") as stream:
            for step, metrics in sorted(steps.items()):
                stream.write(json.dumps({"step": step, "metrics": metrics}) + "\n")


def _remove_places(config: Any) -> Any:
    """Return a run's configuration without paths and addresses."""
    tracking = replace(config.tracking, uri=None)
    storage = replace(config.storage, mirror=None)
    return replace(config, data=None, run_dir=None, tracking=tracking, storage=storage)


def _write_config(config: FinetuneConfig, path: Path) -> None:
    with atomic_write(path, "w") as stream:
        stream.write(configuration.to_yaml(config))
