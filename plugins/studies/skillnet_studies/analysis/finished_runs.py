"""Finished runs: read from their directories, grouped by configuration, and compared.

:func:`read_run` reads one run. :func:`label_runs` gives runs of one configuration one label.
:func:`compare_runs` converts runs to plain scores and compares their systems with
:mod:`skillnet_evidence`. Called by ``skillnet compare``.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from pipelines.data.config.folds import FoldConfig
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE as OUTCOMES
from pipelines.training.evaluation.outcomes import UNIT_SUMS_FILE, OutcomeTable, read_outcomes
from pipelines.training.evaluation.tables import (
    COLUMNS,
    ORIGIN_COLUMNS,
    SCORED_METRICS,
    find_metric,
    score_label,
    sort_rows,
)
from pipelines.training.runs.layout import TRAINED
from pipelines.training.runs.progress_log import PROGRESS, read_metric_history
from skillnet.objectives.base import NamedMetric, find_objective
from skillnet_evidence.comparison import PRETRAINED, SystemComparison, compare_systems
from skillnet_evidence.plot_kit import MetricHistory
from skillnet_evidence.scores import (
    REPLICATE_BASE,
    SPLIT,
    RunFold,
    ScoredMetric,
    ScoredRun,
    TaskCost,
)
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.config.schema import child_types, without_none
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record, run_root

#: Last part of the error message about a damaged file of a run.
REMEDY = "leave this run out, or run it again"
#: Record of versions of a corpus that differ by rounding errors alone, because two processors round
#: a feature differently: in the directory of a study, written by ``python -m lab.equal_versions``.
EQUAL_VERSIONS = "equal_versions.json"
VERSIONS_REMEDY = "write it again with python -m lab.equal_versions"
#: Keys of a run's configuration that do not describe the training: names, paths and the seed.
UNCOMPARED_KEYS = ("name", "run_dir", "data", "tracking", "evaluate", "seed", "init_from")


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: one seed of one system.

    Args:
        label: name of the system in the report.
        folder: run directory.
        seed: seed of the training.
        settings: resolved configuration as plain values.
        rows: rows of ``evaluation.csv``, with numbers parsed.
        outcomes: result of each test row, or of each unit of a kept run.
        trained: content of ``trained.json``.
        total_params: parameters of the complete model; 0 if unknown.
        run_id: MLflow run id, or None.
        digests: corpus -> digest of the corpus that the run used, as far as known; of versions
            that its study records as equal the first.
        pretraining: resolved configuration of the run that this run started from; {} without one
            or if it is unknown.
    """

    label: str
    folder: Path
    seed: int
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    outcomes: OutcomeTable
    trained: Mapping[str, Any]
    total_params: int
    run_id: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """Name of the system in the configuration."""
        return str(self.settings.get("system", "skillnet"))

    @cached_property
    def fold(self) -> FoldConfig:
        """Fold of the corpora that the run read."""
        return configuration.build_config(FoldConfig, self.settings.get("fold") or {})

    @property
    def replicate(self) -> int:
        """Number of the replicate: the seed, and the number of the fold in the higher digits."""
        return self.fold.number * REPLICATE_BASE + self.seed

    @property
    def seconds(self) -> float:
        """Seconds in the training loop."""
        return total_training_seconds(self.trained)

    @property
    def pretraining_seconds(self) -> float | None:
        """Seconds in the training loop of the pretraining, or None if unknown."""
        if not self.settings.get("init_from"):
            return None
        start = self.folder / str(self.settings["init_from"])
        # ``init_from`` names a run directory or the model directory below it.
        for path in (start / TRAINED, start.parent / TRAINED):
            if path.is_file():
                return total_training_seconds(read_trained(path))
        return None

    @cached_property
    def history(self) -> MetricHistory:
        """What the run logged; {} without a log."""
        return read_metric_history(self.folder / PROGRESS)

    @property
    def chosen(self) -> dict[str, str]:
        """Task -> metric that ranks its runs, of the tasks that choose one."""
        tasks = self.settings.get("tasks") or {}
        return {name: task["metric"] for name, task in tasks.items() if task and task.get("metric")}

    @cached_property
    def metrics(self) -> dict[str, NamedMetric]:
        """Task -> metric of the outcomes of its rows.

        Raises:
            UserError: no installed package measures a metric that a task chooses.
        """
        # A row with another metric, such as macro F1, is not the primary score of its task.
        found = {
            row["task"]: find_metric(row["metric"])
            for row in self.rows
            if row["metric"] in SCORED_METRICS
        }
        for task in self.chosen.keys() & found.keys():
            objective = find_objective(self.settings["model"]["tasks"][task]["objective"])
            chosen = self.chosen[task]
            if chosen not in {metric.name for metric in objective.metrics}:
                raise UserError(
                    f"{self.folder}: tasks.{task}.metric is {chosen}, which no installed package "
                    "measures; install the package that does"
                )
            found[task] = objective.compared_metric(chosen)
        return found

    def to_scores(self) -> ScoredRun:
        """Return the scores, costs and times of the run as plain data."""
        rows = [row for row in self.rows if row["split"] == SPLIT]
        costs = {}
        for task in dict.fromkeys(row["task"] for row in rows):
            keys = ("activated_params", "flops_per_example")
            own = [[row[key] for key in keys] for row in rows if row["task"] == task]
            costs[task] = TaskCost(*(float(np.mean(each)) for each in zip(*own, strict=True)))
        has_folds = bool(self.fold.count)
        return ScoredRun(
            self.label,
            self.seed,
            self.outcomes,
            {
                task: ScoredMetric(each.name, each.higher_is_better, score_label(each.name))
                for task, each in self.metrics.items()
            },
            str(self.folder),
            RunFold(
                self.fold.number,
                self.fold.test_to_train if has_folds else None,
                repr(replace(self.fold, number=0)),
            ),
            costs,
            int(self.trained["step"]),
            self.seconds,
            self.pretraining_seconds,
            self,
            float(self.total_params or np.nan),
        )


def compare_runs(
    runs: Sequence[FinishedRun], reference: str | None = None, specialist: str | None = None
) -> SystemComparison:
    """Compare the systems of finished runs; the source of each scored run is the finished one.

    Args:
        runs: runs of all systems and seeds; the runs of one system have one label.
        reference: see :func:`skillnet_evidence.comparison.compare_systems`.
        specialist: label of the system whose scores count as 1.

    Raises:
        UserError: the runs used different versions of a corpus, or chose different metrics.
        EvidenceError: the runs cannot be compared, or a label is unknown.
    """
    corpora: dict[str, tuple[str, FinishedRun]] = {}
    choices: dict[str, tuple[str, FinishedRun]] = {}
    for run in runs:
        for task, metric in run.metrics.items():
            name = run.chosen.get(task, metric.name)
            known, other = choices.setdefault(task, (name, run))
            if known != name:
                raise UserError(
                    f"{run.folder} and {other.folder} rank {task} by different metrics ({name} and "
                    f"{known}); compare runs of one tasks.{task}.metric"
                )
        for name, digest in run.digests.items():
            # The first run with a corpus defines the version that the others must have.
            known, other = corpora.setdefault(name, (digest, run))
            if known != digest:
                raise UserError(
                    f"{run.folder} and {other.folder} used different versions of the corpus {name} "
                    f"({digest[:12]} and {known[:12]}); compare runs of one version"
                )
    tasks = sort_rows(dict.fromkeys(task for run in runs for task, _ in run.outcomes))
    return compare_systems([run.to_scores() for run in runs], reference, specialist, tasks)


def list_finished(comparison: SystemComparison) -> dict[str, list[FinishedRun]]:
    """Return label -> finished runs of a comparison of :func:`compare_runs`."""
    return {label: [run.source for run in runs] for label, runs in comparison.systems.items()}


def read_trained(path: Path) -> dict[str, Any]:
    """Read the ``trained.json`` of a run.

    Raises:
        UserError: the file does not exist or is damaged.
    """
    schema: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "resumed": (int, NoneType),
    }
    return read_record(path, schema, REMEDY)


def total_training_seconds(trained: Mapping[str, Any]) -> float:
    """Return the seconds in the training loop, including the parts before a resume.

    Args:
        trained: content of ``trained.json``. It holds the time since the last resume only; the
            time before is estimated at the same rate.
    """
    steps = int(trained["step"])
    own = steps - int(trained.get("resumed") or 0)
    return float(trained["seconds"]) * (steps / own if own > 0 else 1.0)


def find_run(given: str, uri: str | None = None) -> Path:
    """Return the directory of a run.

    Args:
        given: a path, a name below the run root, or an MLflow run id.
        uri: MLflow tracking URI; None takes the default.

    Raises:
        UserError: there is no such run.
    """
    # Directories first: a lookup in the tracking server is slower and may fail.
    for path in (Path(given).expanduser(), run_root() / given):
        if (path / "config.yaml").is_file():
            return path.absolute()
    from pipelines.training.runs import model_source

    source = model_source.resolve_model(given, uri)
    if source.run is None:
        raise UserError(f"{given} is a model without a run directory; name its run")
    return source.run


def read_run(folder: Path, label: str | None = None) -> FinishedRun:
    """Read a finished run from its directory.

    Args:
        folder: run directory.
        label: name of its system in the report; None derives it from the configuration.

    Raises:
        UserError: the run is not finished or was not evaluated, or a file is damaged.
    """
    # A run of an earlier version lacks keys that were added since. Without their defaults, runs of
    # one configuration would be different systems.
    settings = add_defaults(FinetuneConfig, configuration.load_yaml(folder / "config.yaml"))
    # A kept run has sums in place of the outcome of each row.
    answers = OUTCOMES if (folder / OUTCOMES).is_file() else UNIT_SUMS_FILE
    for name in (TRAINED, "evaluation.csv", answers):
        if not (folder / name).is_file():
            name = OUTCOMES if name == answers else name
            raise UserError(
                f"{folder} has no {name}: the run is not finished or was not evaluated; finish "
                "it with evaluate: true"
            )
    seed = settings.get("seed", 0)
    if not isinstance(seed, int):
        raise UserError(
            f"{folder / 'config.yaml'} is damaged: seed is not a whole number; {REMEDY}"
        )
    schema: dict[str, type | tuple[type, ...]] = {
        "total_params": (int, NoneType),
        "corpora": (dict, NoneType),
        "run_id": (str, NoneType),
    }
    path = folder / "result.json"
    result = read_record(path, schema, REMEDY) if path.is_file() else {}
    # The stored digests are those at training time; the corpora may have changed since.
    digests = result.get("corpora") or read_corpus_digests(settings)
    if not all(isinstance(digest, str) for digest in digests.values()):
        raise UserError(f"{path} is damaged: corpora has a digest that is no text; {REMEDY}")
    equal = read_equal_versions(folder.parent.parent)
    pretraining = read_pretraining_settings(settings, folder)
    return FinishedRun(
        label or make_label(settings),
        folder,
        seed,
        _name_first_versions(settings, equal),
        read_evaluation_rows(folder / "evaluation.csv"),
        read_outcomes(folder / answers),
        read_trained(folder / TRAINED),
        result.get("total_params") or count_parameters(folder / "model"),
        result.get("run_id"),
        {name: equal.get(digest, digest) for name, digest in digests.items()},
        _name_first_versions(pretraining, equal),
    )


def _name_first_versions(
    settings: Mapping[str, Any], equal: Mapping[str, str]
) -> Mapping[str, Any]:
    """Return settings with the first of equal versions of each corpus, if they name versions."""
    versions = settings.get("corpora")
    if not equal or not isinstance(versions, Mapping):
        return settings
    named = {k: equal.get(v, v) if isinstance(v, str) else v for k, v in versions.items()}
    return {**settings, "corpora": named}


def read_evaluation_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of an ``evaluation.csv``; empty numbers become NaN.

    Raises:
        UserError: a column is missing or holds no number.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({error})") from None
    # Line 1 is the header.
    for number, row in enumerate(rows, 2):
        # Runs are compared by the digests in result.json, so the rows need not name their corpus.
        absent = [n for n in COLUMNS if n not in ORIGIN_COLUMNS and row.get(n) is None]
        if absent:
            raise UserError(f"{path}: line {number} has no {absent[0]}")
        for name in ("value", "low", "high", "activated_params", "flops_per_example"):
            try:
                row[name] = float(row[name]) if row[name] else np.nan
            except ValueError:
                raise UserError(
                    f"{path}: line {number}: {name} is {row[name]!r}, not a number"
                ) from None
    return rows


def make_label(settings: Mapping[str, Any]) -> str:
    """Return ``moe``, or ``moe-pretrained`` if the run started from another model."""
    system = str(settings.get("system", "skillnet"))
    return system + (PRETRAINED if settings.get("init_from") else "")


def read_pretraining_settings(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the configuration of the run that a run started from; {} if there is none.

    Args:
        settings: configuration of the run.
        folder: its directory; a kept run names its pretraining relative to it.
    """
    if not settings.get("init_from"):
        return {}
    from pipelines.training.runs.layout import SETTINGS

    start = folder / str(settings["init_from"])
    # Copied weights have the file beside them; a run has it above its model or checkpoints.
    if (start / SETTINGS).is_file():
        return _complete_pretraining(read_record(start / SETTINGS, {}, REMEDY))
    for folder in (start, start.parent, start.parent.parent):
        if (folder / "config.yaml").is_file():
            return _complete_pretraining(configuration.load_yaml(folder / "config.yaml"))
    return {}


def _complete_pretraining(settings: Mapping[str, Any]) -> dict[str, Any]:
    completed: dict[str, Any] = add_defaults(PretrainConfig, settings)
    return completed


def count_parameters(model: Path) -> int:
    """Return the number of parameters of a saved model, from file headers; 0 without a model."""
    from skillnet.serialization import read_tensor_shapes

    return sum(
        math.prod(shape)
        for path in sorted(model.glob("*.safetensors"))
        for shape in read_tensor_shapes(path).values()
    )


def read_corpus_digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return corpus -> current digest of the corpora of a run; missing corpora are left out."""
    tasks = settings.get("tasks") or {}
    digests = {}
    for corpus in sorted({task["corpus"] for task in tasks.values() if task}):
        path = Path(str(settings.get("data") or "")) / corpus / "manifest.json"
        if path.is_file():
            digests[corpus] = str(
                read_record(path, {"digest": str}, f"prepare {corpus} again")["digest"]
            )
    return digests


def list_equal_versions(study: Path) -> list[dict[str, Any]]:
    """Return the entries of a study's record, one per pair of versions; [] without a record.

    Args:
        study: directory of the study.

    Raises:
        UserError: the record is damaged.
    """
    path = study / EQUAL_VERSIONS
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = read_record(path, {"pairs": list}, VERSIONS_REMEDY)["pairs"]
    for entry in entries:
        versions = entry.get("versions") if isinstance(entry, dict) else None
        if not isinstance(versions, list) or len(versions) != 2:
            raise UserError(f"{path} is damaged: a pair has not two versions; {VERSIONS_REMEDY}")
    return entries


def read_equal_versions(study: Path) -> dict[str, str]:
    """Return the digest of a second version -> that of the first, of each recorded pair.

    Args:
        study: directory of the study.

    Raises:
        UserError: the record is damaged.
    """
    pairs = (entry["versions"] for entry in list_equal_versions(study))
    return {second: first for first, second in pairs}


# -- groups --------------------------------------------------------------------------------


def label_runs(runs: Sequence[FinishedRun], names: Sequence[str] = ()) -> list[FinishedRun]:
    """Give runs of one configuration one label, and different configurations different labels.

    Args:
        runs: finished runs.
        names: labels of the configurations, in the order of their first run; empty keeps the
            labels of the runs and numbers duplicates.

    Raises:
        UserError: the number of names differs from the number of configurations, or two runs of
            one configuration have the same seed.
    """
    groups = _group_by_configuration(runs)
    if names and len(names) != len(groups):
        counts = ", ".join(f"{group[0].label} ({len(group)} runs)" for group in groups.values())
        raise UserError(
            f"{len(names)} names for {len(groups)} configurations: {counts}; give one name for each"
        )
    # Equal labels would merge two configurations into one system of the report.
    if len(set(names)) < len(names):
        raise UserError(f"names must differ, got {', '.join(names)}")
    labels: list[str] = []
    named: list[FinishedRun] = []
    for index, members in enumerate(groups.values()):
        label = names[index] if names else _make_unique(members[0].label, labels)
        labels.append(label)
        replicates = [run.replicate for run in members]
        for run in members:
            # A run that counts twice would make the seeds look more alike than they are.
            if replicates.count(run.replicate) > 1:
                equal = [str(each.folder) for each in members if each.replicate == run.replicate]
                fold = f" of fold {run.fold.number}" if run.fold.count else ""
                raise UserError(
                    f"{label}: seed {run.seed}{fold} occurs twice ({' and '.join(equal[:2])}); "
                    "leave one run out"
                )
        named += [replace(run, label=label) for run in sorted(members, key=lambda r: r.replicate)]
        if not names and label != members[0].label:
            console.print_note(
                f"{label}: {members[0].label} with other settings; set another name with --names"
            )
    return named


def find_differing_settings(runs: Sequence[FinishedRun]) -> dict[str, dict[str, str]]:
    """Return flat key -> label -> value for the settings in which the systems differ.

    Settings of pretrainings are compared among pretrained systems, as ``pretraining.KEY``.
    """
    own = _flat_differences({run.label: run.settings for run in runs})
    before = _flat_differences({run.label: run.pretraining for run in runs if run.pretraining})
    labels = [run.label for run in runs]
    # A pretraining has the system and sizes of its run, which the run's own rows show already.
    added = {
        f"pretraining.{key}": {label: values.get(label, "–") for label in labels}
        for key, values in before.items()
        if any(own.get(key, {}).get(label) != value for label, value in values.items())
    }
    return own | added


def _flat_differences(trees: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    flat: dict[str, dict[str, str]] = {}
    for label, settings in trees.items():
        tree = {key: value for key, value in settings.items() if key not in UNCOMPARED_KEYS}
        tree = _without_fold_number(tree)
        flat[label] = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
            for key, value in configuration.flatten_tree(tree).items()
        }
    # dict.fromkeys keeps the order of the configuration, which a set would lose.
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    return {
        key: {label: values.get(key, "–") for label, values in flat.items()}
        for key in keys
        if len({values.get(key, "–") for values in flat.values()}) > 1
    }


def _group_by_configuration(
    runs: Sequence[FinishedRun],
) -> dict[tuple[str, str], list[FinishedRun]]:
    """Group runs that differ only in the seed; pretrained runs also by their pretraining.

    A run with an unknown pretraining joins the only known one of its configuration, if any.
    """
    own = [
        _configuration_digest(
            run.settings, label=run.label, pretrained=bool(run.settings.get("init_from"))
        )
        for run in runs
    ]
    before = [_configuration_digest(run.pretraining) if run.pretraining else "" for run in runs]
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run, key, start in zip(runs, own, before, strict=True):
        # Known pretrainings of runs with the same settings.
        known = {b for k, b in zip(own, before, strict=True) if k == key and b}
        groups.setdefault((key, start or (known.pop() if len(known) == 1 else "")), []).append(run)
    return groups


def _configuration_digest(settings: Mapping[str, Any], **more: Any) -> str:
    """Return a digest that is equal for configurations that train the same model."""
    from pipelines.training.runs.identity import NON_IDENTITY_KEYS

    tree = {key: value for key, value in settings.items() if key not in UNCOMPARED_KEYS}
    tree = _without_fold_number(tree)
    training = {k: v for k, v in (tree.get("training") or {}).items() if k not in NON_IDENTITY_KEYS}
    return configuration.digest_config({"settings": tree | {"training": training}, **more})


def _without_fold_number(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings in which replicates of one study do not differ."""
    fold = {k: v for k, v in (tree.get("fold") or {}).items() if k != "number"}
    return {**tree, "fold": fold} if fold else dict(tree)


def _make_unique(label: str, taken: Sequence[str]) -> str:
    if label not in taken:
        return label
    return next(f"{label}-{n}" for n in range(2, len(taken) + 3) if f"{label}-{n}" not in taken)


def add_defaults(hint: Any, tree: Any) -> Any:
    """Return a stored configuration with today's keys: defaults for those that it lacks.

    A version that stored it may not have known these keys, or have had others, which are left out,
    as are keys below an option that has none. No value is checked.

    Args:
        hint: the dataclass, or the type of a part.
        tree: the stored configuration, or the part.
    """
    types = child_types(hint)
    if types is None or not isinstance(tree, Mapping):
        return tree
    known = {name: types.get(name, types.get("*")) for name in tree if {name, "*"} & types.keys()}
    own = {
        name: add_defaults(below, tree[name])
        for name, below in known.items()
        if not isinstance(tree[name], dict) or below is Any or child_types(below) is not None
    }
    return own if "*" in types else {**configuration.default_values(without_none(hint)), **own}
