"""What a command asks of a cluster, read from its words without loading it.

The configuration classes of the commands live on higher floors; the few keys that count are the
same in all of them, at the top or below ``run`` (a sweep, a study).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from skillnet_platform import config, storage
from skillnet_platform.config.schema import nested, value_at
from skillnet_platform.storage.objects import is_uri

#: Commands that train; the others need one CPU somewhere.
TRAINING = ("pretrain", "finetune", "quickstart", "sweep", "compare", "grow")
#: Commands that train many runs: what is asked of one of them lies below ``run``.
MANY = ("sweep", "compare")
#: Commands that are no clients of the tracker.
UNRECORDED = ("", "fetch", "prepare", "doctor", "tracker", "ui")
#: Keys that name where results are written and corpora are read.
KEYS = ("run_dir", "data", "run.data", "storage.mirror", "run.storage.mirror")
#: Keys that name a model to start from or to look at. ``model`` may be a shape instead.
MODELS = ("from", "init_from", "run.init_from", "pretraining.init_from", "source", "model")
#: What else counts: a run's parallelism, and what a trial takes.
COUNTED = ("training.", "run.training.", "pretraining.training.", "resources.")
#: Options of our own that take no value.
FLAGS = ("json", "help", "detach")


@dataclass(frozen=True)
class Needs:
    """Of one run.

    Args:
        workers: processes that train at once.
        gpus: of all of them together.
        spread: each worker on a host of its own.
        places: paths and URIs that the run names for its results and corpora. An empty one stands
            for the run root, and so do none at all.
        least: workers that an elastic run makes do with; 0 if it needs all.
        cpus: of each worker.
        models: paths and URIs of models that the run starts from.
        then: what a further stage asks for, once this one is done.
        run_dir: where the run writes, if that is a folder; empty for the run root.
        name: of the run.
        keep: checkpoints that it keeps.
        records: whether it records to the tracker, or asks the registry.
    """

    workers: int = 1
    gpus: float = 0
    spread: bool = False
    places: tuple[str, ...] = ()
    least: int = 0
    cpus: float = 1.0
    models: tuple[str, ...] = ()
    then: "Needs | None" = None
    run_dir: str = ""
    name: str = ""
    keep: int = 2
    records: bool = field(default=False, compare=False)

    def words(self) -> str:
        """``2 workers with a GPU each, on 2 hosts``."""
        one = self.workers == 1
        parts = ["1 worker" if one else f"{self.workers} workers"]
        if self.least:
            parts[0] = f"{self.least} to {parts[0]}"
        if self.cpus != 1:
            parts.append(f"with {self.cpus:g} CPUs" if one else f"with {self.cpus:g} CPUs each")
        if self.gpus:
            gpus = self.gpus / self.workers
            count = "a GPU" if gpus == 1 else f"{gpus:g} GPUs"
            parts.append(f"with {count}" if one else f"with {count} each")
        if self.spread and not one:
            parts.append(f"on {self.workers} hosts")
        return " ".join(parts)


def split(argv: Sequence[str], flags: Sequence[str] = FLAGS) -> tuple[list[str], list[str]]:
    """Own options, and from the first bare word on the command that they are about.

    ``--detach finetune --config tiny`` gives ``[--detach]`` and ``[finetune, --config, tiny]``.
    """
    own: list[str] = []
    rest = list(argv)
    while rest and rest[0].startswith("--") and rest[0] != "--":
        word = rest.pop(0)
        own.append(word)
        if "=" not in word and word[2:] not in flags and rest:
            own.append(rest.pop(0))
    return own, rest[1:] if rest[:1] == ["--"] else rest


def needs(words: Sequence[str]) -> Needs:
    """What ``finetune --config tiny --training.workers 2`` asks for.

    Raises:
        UserError: a file of ``--config`` that is missing or not YAML; a value that cannot be read.
    """
    command, *options = words or [""]
    tree: dict[str, Any] = {}
    for key, value in _options(options):
        if key == "config":
            config.merge(tree, config.load_layer(config.find_config(value)))
        elif key in KEYS or key in MODELS or key == "name":
            config.merge(tree, nested(key, config.read_value(value, str | None, key)))
        elif key.startswith(COUNTED):
            config.merge(tree, nested(key, config.read_value(value, Any, key)))
    named = {key: value_at(tree, key) for key in KEYS}
    places = tuple(dict.fromkeys(str(each) for each in named.values() if each))
    given = [value_at(tree, key) for key in MODELS]
    models = tuple(each for each in given if isinstance(each, str) and _is_place(each))
    if command not in TRAINING:
        return Needs(places=places, models=models, records=command not in UNRECORDED)
    read = any(named[key] for key in named if key.endswith("data"))
    written = any(named[key] for key in named if not key.endswith("data"))
    if places and not (read and written):
        places += ("",)  # what is not named lies in the run root
    many = command in MANY
    first = _of_training(tree, "run." if many else "", many)
    if command == "compare" and value_at(tree, "pretraining.training") is not None:
        then = _of_training(tree, "pretraining.", many)
        first = replace(first, then=then if then != first else None)
    run_dir = str(named["run_dir"] or "")
    return replace(
        first,
        places=places,
        models=models,
        run_dir="" if is_uri(run_dir) else run_dir,  # a mirror: the run root is written first
        name=str(value_at(tree, "name") or ""),
        records=True,
    )


def _of_training(tree: dict[str, Any], prefix: str, many: bool) -> Needs:
    """What the training below a key takes; the command itself tells what is wrong in it."""

    def number(key: str, otherwise: float) -> float:
        value = value_at(tree, key)
        usable = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if usable and value > 0 else otherwise

    workers = max(int(number(f"{prefix}training.workers", 1)), 1)
    least = int(number(f"{prefix}training.min_workers", 0))
    gpu = 1.0 if value_at(tree, f"{prefix}training.use_gpu") is True else 0.0
    cpus = 1.0
    if many:
        cpus, gpu = number("resources.cpus", 1.0), number("resources.gpus", gpu)
    strict = value_at(tree, f"{prefix}training.placement") == "strict_spread"
    keep = int(number(f"{prefix}training.keep", Needs.keep))
    least = least if least < workers else 0
    return Needs(workers, workers * gpu, strict, least=least, cpus=cpus, keep=keep)


def folder_of_runs(run_dir: str) -> Path:
    """Where runs are written."""
    return Path(run_dir).expanduser() if run_dir else storage.run_root()


def checkpoint_bytes(asked: Needs) -> int:
    """What the checkpoints that a run keeps take, while one more is written.

    Known of a run that goes on, by its newest checkpoints; and of one that starts from a model on
    this disk, which an optimiser triples. 0 where neither tells.
    """
    there = folder_of_runs(asked.run_dir) / asked.name / "checkpoints" if asked.name else None
    made = [_size(each) for each in there.glob("step-*")] if there and there.is_dir() else []
    begun = [3 * _size(Path(model)) for model in asked.models if Path(model).is_dir()]
    one = max([*made, *(begun if not made else [])], default=0)
    return one * max(asked.keep + 1 - len(made), 1) if one else 0


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _is_place(model: str) -> bool:
    """Whether a model is named by where it is, and not by a run's name or in the registry."""
    return "/" in model and not model.startswith(("models:", "runs:"))


def _options(words: Sequence[str]) -> list[tuple[str, str]]:
    """(key, text) of ``--key value`` and ``--key=value``; a flag has the text "true"."""
    found: list[tuple[str, str]] = []
    waiting = list(words)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("--"):
            continue
        key, equals, text = word[2:].partition("=")
        if not equals:
            takes = bool(waiting) and not waiting[0].startswith("--")
            text = waiting.pop(0) if takes else "true"
        found.append((key, text))
    return found
