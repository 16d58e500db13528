"""What a command asks of a cluster, read from its words without loading it.

The configuration classes of the commands live on higher floors; the few keys that count are the
same in all of them, at the top or below ``run`` (a sweep, a study).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from skillnet_platform import config
from skillnet_platform.typed_tree import nested, value_at

#: Commands that train; the others need one CPU somewhere.
TRAINING = ("pretrain", "finetune", "quickstart", "sweep", "compare", "grow")
#: Keys that name where results are written and corpora are read.
KEYS = ("run_dir", "data", "run.data")
#: Options of our own that take no value.
FLAGS = ("json", "help", "detach")


@dataclass(frozen=True)
class Needs:
    """Of one run.

    Args:
        workers: processes that train at once, each with a CPU.
        gpus: of all of them together.
        spread: each worker on a host of its own.
        places: paths and URIs that the run names for its results and corpora. An empty one stands
            for the run root, and so do none at all.
    """

    workers: int = 1
    gpus: int = 0
    spread: bool = False
    places: tuple[str, ...] = ()

    def words(self) -> str:
        """``2 workers with a GPU each, on 2 hosts``."""
        one = self.workers == 1
        parts = ["1 worker" if one else f"{self.workers} workers"]
        if self.gpus:
            parts.append("with a GPU" if one else "with a GPU each")
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
        UserError: a file of ``--config`` that is missing or not YAML.
    """
    command, *options = words or [""]
    tree: dict[str, Any] = {}
    for key, value in _options(options):
        if key == "config":
            config.merge(tree, config.load_layer(config.find_config(value)))
        elif key in KEYS or key.startswith(("training.", "run.training.")):
            config.merge(tree, nested(key, yaml.safe_load(value)))
    named = {key: value_at(tree, key) for key in KEYS}
    places = tuple(dict.fromkeys(str(each) for each in named.values() if each))
    if command not in TRAINING:
        return Needs(places=places)
    kinds = {key.rpartition(".")[2] for key in named if named[key]}
    if places and len(kinds) < 2:
        places += ("",)  # what is not named lies in the run root
    inner = "run.training" if command in ("sweep", "compare") else "training"
    workers = value_at(tree, f"{inner}.workers")
    count = max(int(workers), 1) if isinstance(workers, int) else 1
    gpu = value_at(tree, f"{inner}.use_gpu") is True
    strict = value_at(tree, f"{inner}.placement") == "strict_spread"
    return Needs(count, count if gpu else 0, strict, places)


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
