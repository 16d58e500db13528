"""Entry points: names that configurations and command lines may use, and the objects behind them.

A name only selects an entry. Nothing that a user hands in is imported.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path


@cache
def find_entries(group: str) -> dict[str, EntryPoint]:
    """Return name -> entry point of installed packages and of this checkout.

    A job on a cluster has our code without package metadata. There the pyproject.toml of the
    uploaded checkout names the entries.

    Args:
        group: such as ``skillnet.commands``.
    """
    return {entry.name: entry for entry in entry_points(group=group)} | find_own_entries(group)


@cache
def find_own_entries(group: str) -> dict[str, EntryPoint]:
    """Return name -> entry point of this checkout; of an installed wheel, those of its metadata.

    The metadata of an editable installation may be older than the pyproject.toml.

    Args:
        group: such as ``skillnet.commands``.
    """
    project = Path(__file__).parents[2] / "pyproject.toml"
    if not project.is_file():
        from importlib.metadata import PackageNotFoundError, distribution

        try:
            entries = distribution("skillnet-platform").entry_points.select(group=group)
        except PackageNotFoundError:
            return {}
        return {entry.name: entry for entry in entries}
    import tomllib

    table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
    named = table.get("entry-points", {}).get(group, {})
    return {name: EntryPoint(name, value, group) for name, value in named.items()}
