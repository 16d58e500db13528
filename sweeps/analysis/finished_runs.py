"""Finished runs, read back from their folders for a comparison, and gathered by system."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from pipelines.evaluation.outcomes import FILE as OUTCOMES
from pipelines.evaluation.outcomes import Outcomes, read_outcomes
from pipelines.runs.mirror import TRAINED
from skillnet_platform import config as configuration
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import read_record, run_root

#: Keys of a run's configuration that say where and for whom it ran, not what was trained.
UNCOMPARED_KEYS = ("name", "run_dir", "data", "tracking", "evaluate", "seed", "init_from")

PRETRAINED = "-pretrained"
REMEDY = "leave this run out, or run it again"


@dataclass(frozen=True)
class FinishedRun:
    """One seed of one system.

    Args:
        label: the system's name in the report.
        folder: of the run.
        seed: of the training.
        settings: its resolved configuration as plain values.
        rows: its ``evaluation.csv``, numbers as numbers.
        outcomes: what became of each test row.
        trained: its ``trained.json``.
        pretraining: resolved configuration of the run that it started from; {} if there was none,
            or it is not known any more.
        total_params: parameters of the whole model; 0 if the run did not say and it is gone.
        run_id: of its MLflow run, or none.
        digests: corpus -> digest of what it was trained and measured on, as far as is known.
    """

    label: str
    folder: Path
    seed: int
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    outcomes: Outcomes
    trained: Mapping[str, Any]
    total_params: int
    run_id: str | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    pretraining: Mapping[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """Name of the system, as configured."""
        return str(self.settings.get("system", "skillnet"))

    @property
    def seconds(self) -> float:
        """Time in the training loop."""
        return total_training_seconds(self.trained)

    @property
    def pretraining_seconds(self) -> float | None:
        """Time in the loop of the run that this one started from; none if that is unknown."""
        if not self.settings.get("init_from"):
            return None
        start = Path(str(self.settings["init_from"]))
        for path in (start / TRAINED, start.parent / TRAINED):
            if path.is_file():
                return total_training_seconds(read_trained(path))
        return None


def read_trained(path: Path) -> dict[str, Any]:
    """A run's ``trained.json``.

    Raises:
        UserError: no such file, or a damaged one.
    """
    told: dict[str, type | tuple[type, ...]] = {
        "step": int,
        "seconds": (int, float),
        "resumed": (int, NoneType),
    }
    return read_record(path, told, REMEDY)


def total_training_seconds(trained: Mapping[str, Any]) -> float:
    """Seconds in the loop; of a run that was taken up again all of it, at its last part's rate.

    Args:
        trained: a run's ``trained.json``, which knows the time of the last part alone.
    """
    done = int(trained["step"])
    own = done - int(trained.get("resumed") or 0)
    return float(trained["seconds"]) * (done / own if own > 0 else 1.0)


def find_run(given: str, uri: str | None = None) -> Path:
    """Folder of a run: a path, a name below the run root, or an MLflow run id.

    Raises:
        UserError: there is none.
    """
    for path in (Path(given).expanduser(), run_root() / given):
        if (path / "config.yaml").is_file():
            return path.absolute()
    from pipelines.runs import model_source

    found = model_source.resolve_model(given, uri)
    if found.run is None:
        raise UserError(f"{given} is a model without its run's folder; give the run")
    return found.run


def read_run(folder: Path, label: str | None = None) -> FinishedRun:
    """Read a finished run.

    Args:
        folder: of the run.
        label: its system's name in the report; none makes one of the configured system.

    Raises:
        UserError: a run that is not finished, was not evaluated, or whose files are not whole.
    """
    settings = configuration.load_yaml(folder / "config.yaml")
    for name in (TRAINED, "evaluation.csv", OUTCOMES):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: the run is not finished, or was not evaluated; run it "
                "to its end with evaluate: true"
            )
    seed = settings.get("seed", 0)
    if not isinstance(seed, int):
        raise UserError(f"{folder / 'config.yaml'} is damaged: seed is no whole number")
    told: dict[str, type | tuple[type, ...]] = {
        "total_params": (int, NoneType),
        "corpora": (dict, NoneType),
        "run_id": (str, NoneType),
    }
    path = folder / "result.json"
    result = read_record(path, told, REMEDY) if path.is_file() else {}
    digests = result.get("corpora") or read_corpus_digests(settings)
    return FinishedRun(
        label or make_label(settings),
        folder,
        seed,
        settings,
        read_evaluation_rows(folder / "evaluation.csv"),
        read_outcomes(folder / OUTCOMES),
        read_trained(folder / TRAINED),
        result.get("total_params") or count_parameters(folder / "model"),
        result.get("run_id"),
        digests,
        read_pretraining_settings(settings),
    )


def read_evaluation_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of an ``evaluation.csv``; empty numbers are NaN.

    Raises:
        UserError: a column is missing or holds no number.
    """
    from pipelines.evaluation.tables import COLUMNS

    try:
        with path.open(encoding="utf-8", newline="") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    except (csv.Error, UnicodeDecodeError) as problem:
        raise UserError(f"{path}: not a CSV file in UTF-8 ({problem})") from None
    for number, row in enumerate(rows, 2):
        absent = [name for name in COLUMNS if row.get(name) is None]
        if absent:
            raise UserError(f"{path}: line {number} has no {absent[0]}")
        for name in ("value", "low", "high", "activated_params", "flops_per_example"):
            try:
                row[name] = float(row[name]) if row[name] else np.nan
            except ValueError:
                raise UserError(
                    f"{path}: line {number}: {name} is {row[name]!r}, no number"
                ) from None
    return rows


def make_label(settings: Mapping[str, Any]) -> str:
    """``moe``, or ``moe-pretrained`` if the run started from another model."""
    system = str(settings.get("system", "skillnet"))
    return system + (PRETRAINED if settings.get("init_from") else "")


def read_pretraining_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration of the run that a run started from; {} if there is none, or it is gone."""
    if not settings.get("init_from"):
        return {}
    from pipelines.training.init_from import SETTINGS

    start = Path(str(settings["init_from"]))
    # A copy of the weights has it beside them, a run beside its model or above its checkpoints.
    if (start / SETTINGS).is_file():
        return read_record(start / SETTINGS, {}, REMEDY)
    for folder in (start, start.parent, start.parent.parent):
        if (folder / "config.yaml").is_file():
            return configuration.load_yaml(folder / "config.yaml")
    return {}


def count_parameters(model: Path) -> int:
    """Parameters of a saved model, from the headers of its files; 0 without a model."""
    from safetensors import safe_open

    total = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "numpy") as tensors:
            total += sum(
                int(np.prod(tensors.get_slice(name).get_shape()))
                for name in tensors.keys()  # noqa: SIM118
            )
    return total


def read_corpus_digests(settings: Mapping[str, Any]) -> dict[str, str]:
    """Corpus -> digest now, of the prepared corpora that a run names; what is gone is left out."""
    tasks = settings.get("tasks") or {}
    found = {}
    for corpus in sorted({task["corpus"] for task in tasks.values() if task}):
        path = Path(str(settings.get("data") or "")) / corpus / "manifest.json"
        if path.is_file():
            found[corpus] = str(
                read_record(path, {"digest": str}, f"prepare {corpus} again")["digest"]
            )
    return found


def label_runs(runs: Sequence[FinishedRun], names: Sequence[str] = ()) -> list[FinishedRun]:
    """Give runs of one configuration one label, and different configurations different ones.

    Args:
        runs: as read.
        names: labels of the configurations, in the order in which they first appear; none
            leaves those that the runs came with, numbered where two would be the same.

    Raises:
        UserError: another number of names than of configurations, or two runs of one
            configuration with one seed.
    """
    groups = _group_by_configuration(runs)
    if names and len(names) != len(groups):
        told = ", ".join(f"{members[0].label} ({len(members)} runs)" for members in groups.values())
        raise UserError(
            f"{len(names)} names for {len(groups)} configurations: {told}; give one for each"
        )
    if len(set(names)) < len(names):
        raise UserError(f"names must differ, got {', '.join(names)}")
    labels: list[str] = []
    named: list[FinishedRun] = []
    for place, members in enumerate(groups.values()):
        label = names[place] if names else _make_unique(members[0].label, labels)
        labels.append(label)
        seeds = [run.seed for run in members]
        for seed in seeds:
            if seeds.count(seed) > 1:
                twice = [str(run.folder) for run in members if run.seed == seed]
                raise UserError(
                    f"{label}: the seed {seed} is there twice ({' and '.join(twice[:2])}); "
                    "leave one out"
                )
        named += [replace(run, label=label) for run in sorted(members, key=lambda r: r.seed)]
        if not names and label != members[0].label:
            console.note(f"{label}: {members[0].label} with other settings; --names renames")
    return named


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Raise UserError unless all runs were measured on the same rows of the same corpora."""
    corpora: dict[str, tuple[str, FinishedRun]] = {}
    weights: dict[tuple[str, str], tuple[np.ndarray, FinishedRun]] = {}
    for run in runs:
        for name, digest in run.digests.items():
            known, other = corpora.setdefault(name, (digest, run))
            if known != digest:
                raise UserError(
                    f"{run.folder} and {other.folder} used different states of the corpus {name} "
                    f"({digest[:12]} and {known[:12]}); compare runs of one state"
                )
        for key in run.outcomes:
            own = run.outcomes[key].weight
            weight, first = weights.setdefault(key, (own, run))
            if not np.array_equal(own, weight):
                raise UserError(
                    f"{run.folder} and {first.folder} were measured on different rows of "
                    f"{key[0]} {key[1]} ({len(own)} and {len(weight)}); compare runs of one state"
                )


def find_differing_settings(runs: Sequence[FinishedRun]) -> dict[str, dict[str, str]]:
    """Flat key -> label -> value, of the settings in which the systems differ.

    Those of pretrainings are compared among the systems that have one, as ``pretraining.KEY``.
    """
    own = _flat_differences({run.label: run.settings for run in runs})
    before = _flat_differences({run.label: run.pretraining for run in runs if run.pretraining})
    labels = [run.label for run in runs]
    # Its system and its sizes follow the run's: the run's own lines say so already.
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
        flat[label] = {
            key: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else str(value)
            for key, value in configuration.flatten(tree).items()
        }
    keys = dict.fromkeys(key for values in flat.values() for key in values)
    return {
        key: {label: values.get(key, "–") for label, values in flat.items()}
        for key in keys
        if len({values.get(key, "–") for values in flat.values()}) > 1
    }


def _group_by_configuration(
    runs: Sequence[FinishedRun],
) -> dict[tuple[str, str], list[FinishedRun]]:
    """Runs that differ in nothing but their seed, together; of pretrained ones also by what that
    pretraining was. One that is not known any more counts as the only known one, if it is.
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
        known = {b for k, b in zip(own, before, strict=True) if k == key and b}
        groups.setdefault((key, start or (known.pop() if len(known) == 1 else "")), []).append(run)
    return groups


def _configuration_digest(settings: Mapping[str, Any], **more: Any) -> str:
    """Equal for configurations that differ in nothing but seed, places and rhythm."""
    from pipelines.runs.identity import NON_IDENTITY_KEYS

    tree = {key: value for key, value in settings.items() if key not in UNCOMPARED_KEYS}
    training = {k: v for k, v in (tree.get("training") or {}).items() if k not in NON_IDENTITY_KEYS}
    return configuration.digest({"settings": tree | {"training": training}, **more})


def _make_unique(label: str, taken: Sequence[str]) -> str:
    if label not in taken:
        return label
    return next(f"{label}-{n}" for n in range(2, len(taken) + 3) if f"{label}-{n}" not in taken)
