"""Versions of installed, absent and damaged packages."""

from importlib.metadata import version
from pathlib import Path

import pytest

from skillnet_platform.package_version import find_version


def test_an_installed_package_has_its_version() -> None:
    assert find_version("pytest") == version("pytest")


def test_an_absent_package_has_none() -> None:
    assert find_version("not-a-package-of-anyone") == ""


@pytest.mark.parametrize("with_backport", [False, True])
def test_an_interrupted_installation_has_none(
    with_backport: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if with_backport:
        # Its import replaces Python's finder, as an import of MLflow does.
        pytest.importorskip("importlib_metadata")
    (tmp_path / "half_installed-1.0.dist-info").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_version("half-installed") == ""
