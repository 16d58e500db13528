"""Entry points: only names select, built-in names stay, a checkout needs no metadata."""

import importlib.metadata
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from pipelines.data.corpora import find_corpus
from skillnet.modality import find_modality
from skillnet.objectives.base import find_objective
from skillnet.systems import find_system
from skillnet_files import entry_points
from tests.helpers.installed_entries import forget_entries, install_entries

#: Group -> (function that finds a name, a built-in name).
GROUPS: dict[str, tuple[Callable[[str], Any], str]] = {
    "skillnet.corpora": (find_corpus, "headings"),
    "skillnet.systems": (find_system, "dense"),
    "skillnet.modalities": (find_modality, "image"),
    "skillnet.objectives": (find_objective, "ctc"),
}


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    forget_entries()


@pytest.mark.parametrize("group", GROUPS)
def test_a_name_selects_and_never_imports(group: str, patch: pytest.MonkeyPatch) -> None:
    find, known = GROUPS[group]
    values = {"other": "pathlib:Path", known: "pathlib:Path", "absent": "nowhere.at_all:X"}
    install_entries(patch, *(EntryPoint(name, value, group) for name, value in values.items()))
    assert find(known).name == known
    with pytest.raises(ValueError, match=r"not a subclass|names no (System|Modality|Objective)"):
        find("other")
    with pytest.raises((ValueError, ImportError), match="nowhere"):
        find("absent")
    for name in ("pathlib:Path", "nowhere.at_all:X"):
        with pytest.raises(ValueError, match="unknown"):
            find(name)


def test_a_checkout_finds_its_names_without_metadata(patch: pytest.MonkeyPatch) -> None:
    groups = {
        each.group
        for each in importlib.metadata.distribution("skillnet-platform").entry_points
        if each.group.startswith("skillnet.")
    }
    assert len(groups) >= 5
    expected = {group: set(entry_points.find_entries(group)) for group in groups}
    install_entries(patch)
    for group in groups:
        assert set(entry_points.find_entries(group)) == expected[group] != set()
