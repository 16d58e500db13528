"""Read finished runs from their directories.

:func:`read_run` reads one run, and :func:`check_comparable` checks that several were evaluated on
the same rows. Called by ``skillnet compare``.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from pipelines.data.config.folds import FoldConfig
from pipelines.training.config.run import FinetuneConfig, PretrainConfig
from pipelines.training.evaluation.outcomes import OUTCOMES_FILE as OUTCOMES
from pipelines.training.evaluation.outcomes import (
    UNIT_SUMS_FILE,
    OutcomeTable,
    RowOutcomes,
    has_equal_rows,
    read_outcomes,
    sum_outcomes,
)
from pipelines.training.runs.layout import TRAINED
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record, run_root
from skillnet_studies.analysis.equal_versions import read_equal_versions

#: Above every seed.
REPLICATE_BASE = 2**32

#: Suffix of the label of a system whose runs start from a pretraining.
PRETRAINED = "-pretrained"
#: Last part of the error message about a damaged file of a run.
REMEDY = "leave this run out, or run it again"


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

    @property
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
    settings = configuration.add_defaults(
        FinetuneConfig, configuration.load_yaml(folder / "config.yaml")
    )
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
    from pipelines.training.evaluation.tables import COLUMNS, ORIGIN_COLUMNS

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
    completed: dict[str, Any] = configuration.add_defaults(PretrainConfig, settings)
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


def find_common_replicates(runs: Sequence[FinishedRun], labels: Sequence[str]) -> set[int]:
    """Return the replicates that all of some systems have.

    Args:
        runs: results of these and other systems.
        labels: names of the systems in tables.
    """
    return set.intersection(
        *({run.replicate for run in runs if run.label == label} for label in labels)
    )


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Raise UserError unless all runs were evaluated on the same rows of the same corpora."""
    plan = replace(runs[0].fold, number=0) if runs else FoldConfig()
    for run in runs:
        if replace(run.fold, number=0) != plan:
            raise UserError(
                f"{run.folder} and {runs[0].folder} were evaluated on different folds: the keys of "
                "fold differ. Compare runs of one study"
            )
    # Runs of folds are paired by replicate.
    labels = dict.fromkeys(run.label for run in runs)
    for label, further in combinations(labels, 2) if plan.count else ():
        if not find_common_replicates(runs, (label, further)):
            raise UserError(
                f"{label} and {further} have no fold and seed in common, so no row was answered by "
                "both; run one of them on folds and seeds of the other"
            )
    corpora: dict[str, tuple[str, FinishedRun]] = {}
    rows: dict[tuple[int, str, str], tuple[RowOutcomes, FinishedRun]] = {}
    for run in runs:
        for name, digest in run.digests.items():
            # The first run with a corpus defines the version that the others must have.
            known, other = corpora.setdefault(name, (digest, run))
            if known != digest:
                raise UserError(
                    f"{run.folder} and {other.folder} used different versions of the corpus {name} "
                    f"({digest[:12]} and {known[:12]}); compare runs of one version"
                )
        for key in run.outcomes:
            own = sum_outcomes(run.outcomes[key])
            # Each fold has test rows of its own.
            known_rows, first = rows.setdefault((run.fold.number, *key), (own, run))
            # Each row contributes its number of symbols or queries, and its unit.
            if not has_equal_rows(own, known_rows):
                raise UserError(
                    f"{run.folder} and {first.folder} were evaluated on different rows of "
                    f"{key[0]} {key[1]} ({len(own)} and {len(known_rows)} units); compare runs of "
                    "one version"
                )
