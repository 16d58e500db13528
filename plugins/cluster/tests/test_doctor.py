"""The machine's checks say what to do."""

import json
import sys
from pathlib import Path

import pytest

from skillnet_cluster import doctor
from skillnet_cluster import doctor as machine_checks
from skillnet_platform import cli


def test_doctor_reports_as_json(run_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(["finetune", "--config", "tiny", "--json"]) == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["ok"] is True
    found = {each["check"]: each for each in reported["findings"]}
    assert {"python", "torch", "ray", "distribution", "disk", "tracker"} <= set(found)
    assert str(run_root) in found["disk"]["seen"]
    assert list(run_root.iterdir()) == [], "it leaves nothing behind"


def test_doctor_fails_where_nothing_can_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path / "file"))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "error" in text
    assert "SKILLNET_HOME" in text


def test_doctor_names_a_tracker_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    (finding,) = machine_checks.check_tracker()
    assert finding.level == "error"
    assert "no MLflow server answers" in finding.seen


def install(site: Path, name: str, script: str) -> None:
    """Write the metadata of an installed distribution with one script."""
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[console_scripts]\n{script} = other.cli:main\n")


def test_our_packages_and_script_are_our_own() -> None:
    (finding,) = machine_checks.check_distributions()
    assert finding.level == "ok"


def test_another_distribution_with_our_script_is_named(tmp_path, monkeypatch):
    pytest.importorskip("importlib_metadata")  # replaces Python's finder
    # An interrupted installation has no metadata.
    (tmp_path / "half_installed-1.0.dist-info").mkdir()
    install(tmp_path, "skillnet-ai", "skillnet")
    install(tmp_path, "unrelated", "unrelated")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = machine_checks.check_distributions()
    assert finding.level == "warning"
    assert "skillnet-ai also installs a script named skillnet" in finding.seen
    assert "skillnet-platform" in finding.advice


@pytest.mark.parametrize("name", machine_checks.OWN_PACKAGES)
def test_a_package_of_another_distribution_is_an_error(name, tmp_path, monkeypatch):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    (finding,) = machine_checks.check_distributions()
    assert finding.level == "error"
    assert f"the package {name} is that of {tmp_path}" in finding.seen


def test_both_scripts_start_the_same_program() -> None:
    import tomllib

    root = Path(__file__).parents[3]
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    assert (
        scripts["skillnet"] == scripts["skillnet-platform"] == "skillnet_platform.cli:run_program"
    )
    assert cli.main(["--version"]) == 0
