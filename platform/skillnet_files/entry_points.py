"""Entry points: names that configurations and command lines may use, and the objects behind them.

A name only selects an entry. Nothing that a user hands in is imported. All groups (commands,
corpora, systems, objectives, modalities, planners, fetchers, weights) are looked up here.
"""

import sys
from functools import cache
from importlib.metadata import EntryPoint, PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any, TypeVar

Named = TypeVar("Named")


def find_entries(group: str) -> dict[str, EntryPoint]:
    """Return name -> entry point of installed packages and of this checkout, whose names win.

    A job on a cluster has our code without package metadata. There the pyproject.toml of the
    uploaded checkout names the entries.

    Args:
        group: such as ``skillnet.commands``.
    """
    # A package that joins the import path later is found, as in a worker of a cluster.
    return _scan(group, tuple(sys.path))


@cache
def _scan(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=group)} | find_own_entries(group)


@cache
def find_own_entries(group: str) -> dict[str, EntryPoint]:
    """Return name -> entry point of this checkout; of an installed wheel, those of its metadata.

    The metadata of an editable installation may be older than the pyproject.toml.

    Args:
        group: such as ``skillnet.commands``.
    """
    project = Path(__file__).parents[2] / "pyproject.toml"
    if project.is_file():
        named = _read_groups(project).get(group, {})
        return {name: EntryPoint(name, value, group) for name, value in named.items()}
    try:
        entries = distribution("skillnet-platform").entry_points.select(group=group)
    except PackageNotFoundError:
        return {}
    return {entry.name: entry for entry in entries}


@cache
def _read_groups(project: Path) -> dict[str, dict[str, str]]:
    import tomllib

    table: dict[str, Any] = tomllib.loads(project.read_text(encoding="utf-8"))
    return dict(table["project"].get("entry-points", {}))


def load_named(group: str, name: str, kind: type[Named]) -> Named | None:
    """Return the object of a name, None if no entry has it.

    Args:
        group: such as ``skillnet.systems``.
        name: as in a configuration.
        kind: class of the objects of the group, which have a ``name``.

    Raises:
        ValueError: the entry point names no such object of the same name.
    """
    entry = find_entries(group).get(name)
    found = None if entry is None else entry.load()
    if entry is None or (isinstance(found, kind) and getattr(found, "name", None) == name):
        return found
    raise ValueError(
        f"the entry point {group}:{name} names no {kind.__name__} {name!r}: {entry.value}"
    )
