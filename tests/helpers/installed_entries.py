"""Entry points that a test installs, and that later tests must not find."""

from importlib.metadata import EntryPoint

import pytest

from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet_files import entry_points


def forget_entries() -> None:
    """Look all entry points up again."""
    for each in (entry_points._scan, find_modality, find_objective):
        each.cache_clear()


def install_entries(patch: pytest.MonkeyPatch, *points: EntryPoint) -> None:
    """Replace the entry points of installed packages, until the caller forgets them."""

    def select(group: str) -> list[EntryPoint]:
        return [each for each in points if each.group == group]

    patch.setattr(entry_points, "entry_points", select)
    forget_entries()
