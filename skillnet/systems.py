"""Systems: what a study compares, by name. Each builds a :class:`TaskModel` from the same sizes.

Built in are ``skillnet`` and the baselines of :mod:`skillnet.baselines`; a third party adds one
through the entry point group ``skillnet.systems``, whose entries name a :class:`System`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from skillnet.config import SkillNetConfig
from skillnet.model import SkillNet
from skillnet.multitask_model import NoOptions, TaskModel
from skillnet.skills import nearest

GROUP = "skillnet.systems"

#: The baselines. Also entry points; named here too so that a checkout works where the package is
#: not installed, as in a job on a cluster.
BUILT_IN = {
    "dense": "skillnet.baselines.dense:DENSE",
    "moe": "skillnet.baselines.moe:MOE",
    "specialist": "skillnet.baselines.specialist:SPECIALIST",
}


def _unchanged(config: SkillNetConfig, options: Any) -> SkillNetConfig:
    return config


@dataclass(frozen=True)
class System:
    """How to build one system.

    Args:
        name: as in configurations and reports.
        model: its class; called with the system's configuration and options.
        configure: (the study's configuration, options) -> the system's own, for example with
            other widths; the saved model keeps the system's own.
        options: dataclass of the system's options; its ``__post_init__`` checks them.
        summary: one line for people.
    """

    name: str
    model: type[TaskModel]
    configure: Callable[[SkillNetConfig, Any], SkillNetConfig] = _unchanged
    options: type = NoOptions
    summary: str = ""

    def read_options(self, given: Mapping[str, Any] | None) -> Any:
        """The options as the system's dataclass. ValueError for a key that it does not have."""
        known = [field.name for field in dataclasses.fields(self.options)]
        for key in given or {}:
            if key not in known:
                hint = nearest(key, known) if known else "; it has none"
                raise ValueError(f"system {self.name}: unknown option {key!r}{hint}")
        return self.options(**(given or {}))

    def build(self, config: SkillNetConfig, given: Mapping[str, Any] | None = None) -> TaskModel:
        """A fresh model at the study's sizes."""
        options = self.read_options(given)
        return self.model(self.configure(config, options), options)


SKILLNET = System("skillnet", SkillNet, summary="one encoder, its skills activated per task")


def system_names() -> list[str]:
    """Names of all systems that are installed."""
    return sorted({SKILLNET.name, *_entries()})


def _entries() -> dict[str, EntryPoint]:
    others = {entry.name: entry for entry in entry_points(group=GROUP)}
    return others | {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}


def find_system(name: str) -> System:
    """The system of that name.

    Raises:
        ValueError: no such system (with the nearest right name), or an entry point that names
            something else than a system.
    """
    if name == SKILLNET.name:
        return SKILLNET
    entry = _entries().get(name)
    if entry is not None:
        found = entry.load()
        if not isinstance(found, System):
            raise ValueError(f"the entry point {GROUP}:{name} names no System: {entry.value}")
        return found
    raise ValueError(f"unknown system {name!r}{nearest(name, system_names())}")


def build_system(
    name: str, config: SkillNetConfig, options: Mapping[str, Any] | None = None
) -> TaskModel:
    """A fresh model of the named system; see :meth:`System.build`."""
    return find_system(name).build(config, options)


def load(path: str | Path, task: str | None = None) -> TaskModel:
    """A saved model of any system, in evaluation mode; with ``task`` only what it touches.

    Raises:
        ValueError: files that are missing, altered or do not fit; an unknown task or system.
    """
    from skillnet.multitask_model import load as load_files

    return load_files(Path(path), task)
