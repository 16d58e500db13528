"""Results of a study that outlive its machine: two files without weights, rows and places.

<keep>/<study>.parquet   sums of the outcomes of each unit of each run: all that the tests need
<keep>/<study>.yaml      everything else; an entry has the name of a file of the study's directory
  study.yaml, study.json configuration and tuning, without paths of the machine
  tuning                 scores and commits of finished tuning trials
  notice.txt             limits that were found later, written by hand; reports show them
  equal_versions.json    versions of a corpus that differ by rounding errors alone
  references.json        scores of the simple references
  reserve.json           reads of the reserve, which ``--read_reserve once`` opens
  runs, by name          ``RUN_FILES`` of each finished run

To be committed as runs finish. :class:`KeptTuning` adds an entry after each tuning trial,
:func:`keep_results` the others after each replicate. A study on another machine takes both over and
runs only what is missing. :func:`open_study` unpacks both files into a directory of a study, which
``skillnet compare <keep>/<study>`` and the writers of tables read.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from pipelines.data.config.folds import is_reserve
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.outcomes import (
    OUTCOMES_FILE,
    SCHEMA,
    UNIT_SUMS_FILE,
    OutcomeTable,
    read_outcomes,
)
from pipelines.training.evaluation.tables import name_metric
from pipelines.training.runs.layout import CONFIG, RESULT, TRAINED, read_result
from pipelines.training.runs.mirror import START, RunMirror
from pipelines.training.runs.progress_log import PROGRESS, read_metric_history
from skillnet_evidence.units import sum_outcomes
from skillnet_platform import config as configuration
from skillnet_platform.config import safe_yaml
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import atomic_write, read_json, run_root, write_json
from skillnet_studies.analysis.finished_runs import EQUAL_VERSIONS, add_defaults
from skillnet_studies.config.study import (
    NOTICE,
    REFERENCES_FILE,
    STUDY_FILE,
    STUDY_LEDGER,
    StudyConfig,
)
from skillnet_studies.study.identity import find_study_difference
from sweeps.trials.trial import Trial, TrialOutcome

EVALUATION = "evaluation.csv"
#: Results on the reserve, in the directory of a final run. Only skillnet_studies.study.reserve
#: reads them.
RESERVE_SUMS, RESERVE_ROWS = "reserve_sums.parquet", "reserve.csv"
#: Reads of the reserve, in the directory of a study.
RESERVE_RECORD = "reserve.json"
#: Directory of a kept run with its initial weights' run, and entry of the tuning trials.
PRETRAINING, TUNING = "pretraining", "tuning"
#: Keys of an entry of the tuning.
TUNING_KEYS = ("name", "settings", "score", "scores", "step", "seconds")
#: Keys of ``trained.json`` and ``result.json`` that mean something on another machine.
TRAINED_KEYS = ("step", "resumed", "seconds", "rows_per_second", "world", "commit", "precision")
RESULT_KEYS = ("name", "step", "seconds", "total_params", "corpora")
#: Files that are unpacked of a study and of a run; a run with a result is complete.
STUDY_FILES = (STUDY_FILE, STUDY_LEDGER, NOTICE, EQUAL_VERSIONS, REFERENCES_FILE, RESERVE_RECORD)
RUN_FILES = (
    CONFIG, TRAINED, EVALUATION, PROGRESS, RESERVE_ROWS, f"{PRETRAINING}/{CONFIG}",
    f"{PRETRAINING}/{TRAINED}", RESULT,
)  # fmt: skip
#: Columns of the Parquet file before those of outcomes.
RUN_COLUMNS = {"run": pa.string(), "system": pa.string(), "fold": pa.int32(), "seed": pa.int64()}
SUMS_SCHEMA = pa.schema([*RUN_COLUMNS.items(), *SCHEMA])
#: Shorter texts than this are written where they occur, longer ones once.
SHARED_CHARACTERS = 120
#: Values of a record, aliases written out: ten times those of the largest kept study.
MAX_RECORD_VALUES = 1_000_000


class KeptStudy:
    """Content of the two files of a study; empty if they do not exist.

    Args:
        path: place of the files, without their suffix.

    Raises:
        UserError: a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.record, self.parquet = (
            path.with_name(f"{path.name}.{suffix}") for suffix in ("yaml", "parquet")
        )
        self.content: dict[str, Any] = {}
        if self.record.is_file():
            try:
                self.content = load_record_yaml(self.record.read_text(encoding="utf-8"))
                runs = self.content.get("runs", {})
                is_valid = all(isinstance(each, dict) and RESULT in each for each in runs.values())
            except (ValueError, AttributeError) as error:
                raise UserError(
                    f"{self.record}: no kept study ({first_line(error)}). Restore both files"
                ) from None
            # Names become paths of directories.
            if not is_valid or any(Path(str(name)).name != name for name in runs):
                raise UserError(f"{self.record}: no kept runs. Restore both files of the study")
        self.sums = _read_sums(self.parquet, list(self.runs))

    @property
    def runs(self) -> dict[str, dict[str, Any]]:
        """Name of each kept run -> its files."""
        runs: dict[str, dict[str, Any]] = self.content.setdefault("runs", {})
        return runs

    def add_run(self, system: str, run: Path) -> None:
        """Add a finished run without weights, rows and paths of this machine.

        Args:
            system: label of its system.
            run: run directory; its name is that of the run.
        """
        config = configuration.build_config(FinetuneConfig, configuration.load_yaml(run / CONFIG))
        record: dict[str, Any] = {TRAINED: _pick(read_json(run / TRAINED), TRAINED_KEYS)}
        if config.init_from:
            start = run / config.init_from
            record |= _pack_pretraining(start if (start / CONFIG).is_file() else start.parent)
        init_from = PRETRAINING if config.init_from else None
        record[CONFIG] = configuration.to_dict(replace(_remove_places(config), init_from=init_from))
        for name in (EVALUATION, RESERVE_ROWS):
            if (run / name).is_file():
                record[name] = (run / name).read_text(encoding="utf-8")
        if curves := _pick_curves(run / PROGRESS):
            record[PROGRESS] = curves
        result = _pick(read_result(run / RESULT), RESULT_KEYS)
        record[RESULT] = result | {"model": "not kept", "evaluation": []}
        self.runs[run.name] = record
        is_sum = (run / UNIT_SUMS_FILE).is_file()
        first = [run.name, system, config.fold.number, config.seed]
        for file in (UNIT_SUMS_FILE if is_sum else OUTCOMES_FILE, RESERVE_SUMS):
            if (run / file).is_file():
                table = sum_table(read_outcomes(run / file)).to_table()
                columns = [
                    pa.array([value] * len(table), kind)
                    for value, kind in zip(first, RUN_COLUMNS.values(), strict=True)
                ]
                table = pa.table([*columns, *table.columns], SUMS_SCHEMA)
                self.sums = pa.concat_tables([self.sums, table])

    def write(self) -> None:
        """Write both files; the second commits what the first has added."""
        self.record.parent.mkdir(parents=True, exist_ok=True)
        if self.runs:
            with atomic_write(self.parquet) as stream:
                pq.write_table(self.sums, stream, compression="zstd", compression_level=19)
        with atomic_write(self.record, "w") as text:
            text.write(dump_record_yaml(_share(self.content, {})))

    def unpack(self, folder: Path) -> None:
        """Write the files of a study and of its runs; a complete run stays as it is.

        Args:
            folder: directory of the study.
        """
        for name in STUDY_FILES:
            # Limits and versions may have been added since the directory was written.
            is_new = not (folder / name).is_file() or name in (NOTICE, EQUAL_VERSIONS)
            if name in self.content and is_new:
                _write_file(folder / name, self.content[name])
        absent = [name for name in self.runs if not (folder / "runs" / name / RESULT).is_file()]
        for name in absent:
            run = folder / "runs" / name
            # A part of the run that was lost would not fit the kept files.
            shutil.rmtree(run, ignore_errors=True)
            run.mkdir(parents=True)
            sums = self.sums.filter(pc.equal(self.sums["run"], name)).select(SCHEMA.names)
            is_reserved = pa.array(map(is_reserve, sums["split"].to_pylist()))
            for file, mask in (
                (UNIT_SUMS_FILE, pc.invert(is_reserved)),
                (RESERVE_SUMS, is_reserved),
            ):
                if len(part := sums.filter(mask)):
                    pq.write_table(part, run / file)
            for file in RUN_FILES:
                if file in self.runs[name]:
                    _write_file(run / file, self.runs[name][file])


@contextlib.contextmanager
def change_kept(path: Path) -> Iterator[KeptStudy]:
    """Provide the kept results of a study, and write them at the end of the block.

    Args:
        path: place of the files, without their suffix.
    """
    kept = KeptStudy(path)
    yield kept
    kept.write()


def open_study(given: Path) -> Path:
    """Return the directory of a study; kept results are unpacked into a temporary directory.

    Args:
        given: directory of a study, or the path of kept results with or without ``.yaml``. Another
            path is returned as it is.

    Raises:
        UserError: a kept file is damaged.
    """
    path = given.with_name(given.name.removesuffix(".yaml")) if given.name else given
    files = [path.with_name(f"{path.name}.{suffix}") for suffix in ("yaml", "parquet")]
    if path.is_dir() or not all(file.is_file() for file in files):
        return given
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return _unpack_once(path.absolute(), digest)


@cache
def _unpack_once(path: Path, digest: str) -> Path:
    """Return the directory of unpacked files, of this process and of this content."""
    folder = Path(_make_copies().name) / digest[:16] / path.name
    KeptStudy(path).unpack(folder)
    return folder


@cache
def _make_copies() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="skillnet-kept-")


def write_document(study: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write a JSON document of a study: a file of its directory, or an entry of its kept results.

    Args:
        study: directory of the study, or path of its kept results.
        name: name of the file.
        document: plain values.
    """
    if study.is_dir():
        write_json(study / name, document)
    else:
        with change_kept(study) as kept:
            kept.content[name] = document


def keep_results(config: StudyConfig, outcomes: Sequence[TrialOutcome]) -> None:
    """Keep the ledger and the finished runs that are not kept yet.

    Args:
        config: the study, with ``keep``.
        outcomes: outcomes of final runs.
    """
    with change_kept(find_kept_path(config)) as kept:
        kept.content[STUDY_FILE] = _make_portable(config)
        kept.content[STUDY_LEDGER] = read_json(config.folder / STUDY_LEDGER)
        for outcome in outcomes:
            if outcome.status == "finished" and outcome.name not in kept.runs:
                kept.add_run(str(outcome.group), outcome.folder)


class KeptTuning:
    """Scores of the tuning trials of a study with ``keep``; without it nothing is kept or found.

    Args:
        config: the study.

    Raises:
        UserError: an entry is damaged.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._path = find_kept_path(config) if config.keep else None
        self._trials: dict[str, dict[str, Any]] = {}
        if self._path is None:
            return
        kept = KeptStudy(self._path)
        for number, entry in enumerate(kept.content.get(TUNING, []), 1):
            try:
                # The entries of the final study and of studies/dense name no commit.
                known = {"commit": entry.get("commit")}
                self._trials[entry["name"]] = {key: entry[key] for key in TUNING_KEYS} | known
            except (AttributeError, KeyError, TypeError) as error:
                raise UserError(
                    f"{kept.record}: {TUNING}, entry {number}: not the record of a trial. Remove "
                    "the entry; the trial then runs again"
                ) from error

    def find_outcome(self, trial: Trial) -> TrialOutcome | None:
        """Return the outcome of a trial with these settings; None if it must run.

        Args:
            trial: settings that the tuning tried.
        """
        folder = self._config.folder / "tuning" / trial.name
        entry = self._trials.get(trial.name)
        # The run on this machine has all files, also those that are not kept.
        if entry is None or entry["settings"] != dict(trial.settings) or folder.is_dir():
            return None
        return TrialOutcome(
            name=trial.name,
            group=trial.group or trial.name,
            folder=folder,
            status="finished",
            result={key: entry[key] for key in ("step", "seconds", "commit")},
            reports=[{"step": entry["step"], "score": entry["score"], "scores": entry["scores"]}],
            settings=dict(trial.settings),
            seed=trial.config.seed,
        )

    def keep_outcome(self, outcome: TrialOutcome) -> None:
        """Write the scores of a finished trial; a trial that is kept already stays as it is.

        Args:
            outcome: score and status of a tuning trial.
        """
        if self._path is None or outcome.status != "finished" or not outcome.reports:
            return
        known = self._trials.get(outcome.name)
        if known is not None and known["settings"] == outcome.settings:
            return
        self._trials[outcome.name] = {
            "name": outcome.name,
            "settings": outcome.settings,
            "score": outcome.score,
            "scores": outcome.reports[-1]["scores"],
            "step": outcome.step,
            "seconds": outcome.seconds,
            "commit": outcome.commit,
        }
        with change_kept(self._path) as kept:
            kept.content[STUDY_FILE] = _make_portable(self._config)
            kept.content[TUNING] = list(self._trials.values())


def restore_results(config: StudyConfig) -> set[str]:
    """Unpack kept results into the study's directory, where they count as finished runs.

    Args:
        config: the study.

    Returns:
        Names of the kept runs.

    Raises:
        UserError: the kept results are damaged, or of a study with other settings.
    """
    kept = KeptStudy(find_kept_path(config)) if config.keep else None
    if kept is None or STUDY_FILE not in kept.content:
        return set()
    difference = find_study_difference(kept.content[STUDY_FILE], config)
    if difference:
        raise UserError(
            f"keep: {kept.record} has the results of a study with {difference}. Give another "
            "--name, or another directory"
        )
    # A study that is still being tuned has no results.
    if STUDY_LEDGER in kept.content:
        kept.unpack(config.folder)
    return set(kept.runs)


def is_kept_run(run: Path) -> bool:
    """Return whether a run directory was restored from kept results."""
    return (run / UNIT_SUMS_FILE).is_file()


def find_kept_path(config: StudyConfig) -> Path:
    """Return the path of a study's kept results, without the suffix of a file."""
    return Path(str(config.keep)).expanduser() / str(config.name)


def sum_table(outcomes: OutcomeTable) -> OutcomeTable:
    """Return the sums of each unit, for each task and split.

    Args:
        outcomes: numerator, denominator and unit of each row.
    """
    sums = OutcomeTable()
    for task, split in outcomes:
        part = sum_outcomes(outcomes[task, split])
        sums.add(task, split, part.numerator, part.denominator, part.rank, part.unit)
    return sums


# -- stored configurations ------------------------------------------------------------------


def read_study_config(folder: Path) -> StudyConfig:
    """Return the configuration of a stored study; a key that it lacks has its default.

    Args:
        folder: directory of a study, or path of its kept results.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = open_study(folder) / STUDY_FILE
    tree = add_defaults(StudyConfig, configuration.load_yaml(path))
    try:
        return configuration.build_config(StudyConfig, tree)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def adopt_study_settings(config: StudyConfig, studies: Sequence[Path]) -> StudyConfig:
    """Return the configuration of a report with the claims and roles of its study.

    Claims belong to a study, so its report has them again. Claims and roles of the call win. Runs
    of several studies, or of none, have no common claims.

    Args:
        config: the call.
        studies: directories of the studies that it names.
    """
    if len(config.runs) != 1 or len(studies) != 1 or not (studies[0] / STUDY_FILE).is_file():
        return config
    stored = read_study_config(studies[0])
    return replace(
        config,
        claims=config.claims if config.claims.stated else stored.claims,
        reference=config.reference or stored.reference,
        specialist=config.specialist or stored.specialist,
    )


def fetch_finished_runs(uri: str) -> Path:
    """Download a finished run, or all finished runs of a study, without models.

    Args:
        uri: URI of the directory of a run or study.

    Returns:
        Local directory of the copy.

    Raises:
        UserError: there is no finished run, or the store rejects the request.
        StoreUnavailableError: the store does not respond.
    """
    cache = run_root() / "cache" / "runs" / hashlib.sha256(uri.encode()).hexdigest()[:16]
    ledger = RunMirror(uri, cache / uri.rstrip("/").rpartition("/")[2])
    if not ledger.has(STUDY_LEDGER):
        _fetch_run(ledger)
        return ledger.local
    ledger.download(STUDY_FILE, STUDY_LEDGER)
    for entry in read_json(ledger.local / STUDY_LEDGER)["runs"]:
        # The name comes from the store: it must not lead out of the directory.
        names = PurePosixPath(str(entry["folder"])).parts
        if entry["status"] == "finished" and ".." not in names and "/" not in names:
            _fetch_run(RunMirror(ledger.uri_of(*names), ledger.local.joinpath(*names)))
    return ledger.local


def _fetch_run(run: RunMirror) -> None:
    if not run.has(RESULT):
        raise UserError(f"{run.uri} holds no finished run ({RESULT}) and no study ({STUDY_LEDGER})")
    run.download(*START)
    run.download_results()


# -- files ---------------------------------------------------------------------------------


def _read_sums(path: Path, runs: Sequence[str]) -> pa.Table:
    """Return the sums of some runs; a keep that was killed leaves sums of further ones."""
    if not runs:
        return SUMS_SCHEMA.empty_table()
    try:
        table = pq.read_table(path).select(SUMS_SCHEMA.names).cast(SUMS_SCHEMA)
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(
            f"{path}: no sums of a study ({first_line(error)}). Restore both files of the study"
        ) from None
    table = table.filter(pc.is_in(table["run"], pa.array(runs)))
    if absent := set(runs) - set(table["run"].unique().to_pylist()):
        raise UserError(
            f"{path}: no sums of the run {min(absent)}. Restore both files of the study"
        )
    return table


def _share(value: Any, known: dict[str, Any]) -> Any:
    """Return a tree in which equal mappings and lists are one object, which YAML writes once."""
    if isinstance(value, dict):
        value = {key: _share(below, known) for key, below in value.items()}
    elif isinstance(value, list):
        value = [_share(below, known) for below in value]
    else:
        return value
    text = json.dumps(value, default=str)
    return known.setdefault(text, value) if len(text) > SHARED_CHARACTERS else value


def _write_file(path: Path, content: Any) -> None:
    """Write a text, or a tree in the format of the file's suffix.

    The kept files stay, so nothing waits for the disk.
    """
    if path.suffix == ".json":
        content = f"{json.dumps(content, indent=2)}\n"
    elif not isinstance(content, str):
        content = dump_record_yaml(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def _make_portable(config: StudyConfig) -> dict[str, Any]:
    portable = replace(config, run_dir=None, keep=None, output=None)
    portable.run = _remove_places(config.run)
    portable.pretraining = _remove_places(config.pretraining)
    portable.tracking = replace(config.tracking, uri=None)
    return configuration.to_dict(portable)


def _remove_places(config: Any) -> Any:
    """Return a run's configuration without paths and addresses."""
    tracking = replace(config.tracking, uri=None)
    storage = replace(config.storage, mirror=None)
    return replace(config, data=None, run_dir=None, tracking=tracking, storage=storage)


def _pack_pretraining(start: Path) -> dict[str, Any]:
    """Return the files of the run that a kept run started from; {} if it is unknown."""
    if not (start / CONFIG).is_file():
        return {}
    before = configuration.build_config(FinetuneConfig, configuration.load_yaml(start / CONFIG))
    portable = replace(_remove_places(before), init_from=None)
    record = {f"{PRETRAINING}/{CONFIG}": configuration.to_dict(portable)}
    if (start / TRAINED).is_file():
        record[f"{PRETRAINING}/{TRAINED}"] = _pick(read_json(start / TRAINED), TRAINED_KEYS)
    return record


def _pick(document: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: document[key] for key in keys if key in document}


def _pick_curves(progress: Path) -> str:
    """Return the validation scores of a run, from which its report computes budgets, as lines."""
    validation = name_metric("", "validation", "")  # what the names of all tasks contain
    steps: dict[int, dict[str, float]] = {}
    for name, points in read_metric_history(progress).items():
        if validation in name:
            for step, value in points:
                steps.setdefault(step, {})[name] = value
    lines = ({"step": step, "metrics": metrics} for step, metrics in sorted(steps.items()))
    return "".join(f"{json.dumps(line)}\n" for line in lines)


def load_record_yaml(text: str) -> Any:
    """Return the value of a long YAML text that :func:`dump_record_yaml` wrote.

    libyaml reads it, which is ten times faster and limits the depth itself. Duplicate keys are not
    rejected.

    Raises:
        ValueError: not YAML, a tag that creates an object, or aliases that stand for a huge tree.
    """
    try:
        value = _RecordLoader(text).get_single_data()
        safe_yaml.check_tree_size(value, MAX_RECORD_VALUES)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("a value holds itself") from None
    return value


def dump_record_yaml(tree: Any) -> str:
    """Return the YAML text of a record: objects that occur twice as aliases, lines as blocks."""
    text: str = yaml.dump(
        tree, Dumper=_RecordDumper, sort_keys=False, allow_unicode=True, default_flow_style=None,
        width=120,
    )  # fmt: skip
    return text


# Not every PyYAML is built with libyaml.
class _RecordLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Safe loader of records."""


class _RecordDumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Safe dumper that writes a text of several lines as a block."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return the node of a text."""
        style = "|" if "\n" in text else None
        node: yaml.ScalarNode = self.represent_scalar("tag:yaml.org,2002:str", text, style)
        return node


_RecordDumper.add_multi_representer(str, _RecordDumper.represent_text)
_RecordDumper.add_representer(str, _RecordDumper.represent_text)
safe_yaml.resolve_exponents(_RecordLoader, _RecordDumper)
