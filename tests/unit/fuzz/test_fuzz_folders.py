"""Folders of sweeps, of compared runs and of models with random damage: only named errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs import model_source
from pipelines.training.runs.bundle_manifest import BUNDLE_FORMAT, compute_bundle_digest
from skillnet_studies.analysis.finished_runs import compare_runs, label_runs, read_run
from sweeps.search import ranking
from sweeps.trials.ledger import LedgerEntry
from sweeps.trials.trial import Trial, TrialOutcome
from tests.helpers.random_damage import PLACES, VALUES, WOUNDS, budget, damaged, named, replaced
from tests.helpers.synthetic_runs import write_run

pytestmark = pytest.mark.fuzz

#: What a trial leaves, as the driver reads it.
TRIAL: dict[str, list[Any]] = {
    "result.json": [
        {
            "name": "000",
            "step": 4,
            "seconds": 1.5,
            "model": "model",
            "evaluation": [],
            "run_id": "a",
        }
    ],
    "outcome.json": [{"status": "stopped", "error": None, "score": 0.5, "step": 4}],
    "reports.jsonl": [
        {"step": step, "score": 0.4, "scores": {"text_to_code": 0.4}, "flops_per_example": 1e6}
        for step in (2, 4)
    ],
    "run.json": [{"run_id": "a", "uri": "sqlite:///a.db"}],
    "progress.jsonl": [{"step": 4, "time": 1.0, "key": "training/loss", "value": 2.0}],
}


def read_trial(folder: Path) -> TrialOutcome | None:
    """Read a trial's folder as a resumed sweep does, up to its table."""
    entry = LedgerEntry(Trial("000", FinetuneConfig()), folder)
    settled = entry.load_settled()
    if settled is not None:
        ranking.build_ranking_table(ranking.rank_configurations([settled]))
    entry.steps_done()
    return settled


def lay(folder: Path, leave_out: str = "") -> list[Path]:
    """Create the folder of a complete trial again; return its files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, lines in TRIAL.items():
        if name != leave_out:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sorted(folder.iterdir())


def test_a_whole_trial_is_read(tmp_path: Path) -> None:
    lay(tmp_path / "trial")
    finished = read_trial(tmp_path / "trial")
    assert finished is not None
    assert (finished.status, finished.step, finished.score, finished.run_id) == (
        *("finished", 4, 0.4),
        "a",
    )
    lay(tmp_path / "trial", "result.json")
    stopped = read_trial(tmp_path / "trial")
    assert stopped is not None
    assert stopped.status == "stopped"


@given(st.integers(0, 40), WOUNDS, st.sampled_from(["", "result.json"]))
@budget(60, 1000)
def test_a_trial_with_a_damaged_file(
    tmp_path: Path, number: int, wounds: Any, leave_out: str
) -> None:
    files = lay(tmp_path / "trial", leave_out)
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), wounds))
    named(lambda: read_trial(tmp_path / "trial"))


@given(st.integers(0, 40), VALUES, PLACES, st.sampled_from(["", "result.json"]))
@budget(60, 1000)
def test_a_trial_with_any_value_anywhere(
    tmp_path: Path, number: int, value: Any, place: list[int], leave_out: str
) -> None:
    files = lay(tmp_path / "trial", leave_out)
    path = files[number % len(files)]
    lines = [json.dumps(replaced(line, place, value)) for line in TRIAL[path.name]]
    path.write_text("\n".join(lines) + "\n")
    named(lambda: read_trial(tmp_path / "trial"))


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "made", rows=20)


def copied(run: Path, place: Path) -> Path:
    """Copy the folder of a complete run again."""
    copy = place / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    return copy


def read_compared(folder: Path) -> None:
    """What ``compare`` does with each run before it computes."""
    runs = label_runs([read_run(folder)])
    compare_runs(runs)
    assert runs[0].seconds is not None


@given(st.integers(0, 40), WOUNDS)
@budget(40, 500)
def test_a_compared_run_with_a_damaged_file(
    compared: Path, tmp_path: Path, number: int, wounds: Any
) -> None:
    read_compared(compared)
    copy = copied(compared, tmp_path)
    files = sorted(path for path in copy.iterdir() if path.is_file())
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), wounds))
    named(lambda: read_compared(copy))


@given(st.sampled_from(["trained.json", "result.json"]), VALUES, PLACES)
@budget(40, 500)
def test_a_compared_run_with_any_value_anywhere(
    compared: Path, tmp_path: Path, name: str, value: Any, place: list[int]
) -> None:
    copy = copied(compared, tmp_path)
    reported = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(replaced(reported, place, value)))
    named(lambda: read_compared(copy))


#: What is read of a model's folder before its weights: of a run, and of a bundle.
SETTINGS = {"seed": 3, "tasks": {"text_to_code": {"corpus": "functions", "max_length": 96}}}
SERVING = {
    "format": BUNDLE_FORMAT,
    "package": "0.1.0",
    "weights_digest": "a",
    "run_id": "a",
    "settings": SETTINGS,
    "steps": 4,
    "evaluation": [],
    "tasks": {},
    "files": {},
}
MODELS: dict[str, dict[str, Any]] = {
    "run": {
        "model/manifest.json": {},
        "model/config.json": {},
        "config.yaml": SETTINGS,
        "trained.json": {"step": 4},
        "run.json": {"run_id": "a", "uri": "sqlite:///a.db"},
    },
    "bundle": {"serving.json": SERVING | {"digest": compute_bundle_digest(SERVING)}},
}


def lay_model(folder: Path, kind: str) -> list[Path]:
    """Create a model's folder again; return the files that are read."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, reported in MODELS[kind].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(reported))
    return [folder / name for name in MODELS[kind] if not name.startswith("model/")]


def look_up(folder: Path) -> model_source.ModelSource:
    """What every command that takes a model does first."""
    source = model_source.resolve_model(str(folder))
    assert source.seed is not None
    assert source.auxiliary <= set(source.corpora) == set(source.limits)
    return source


@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_model_is_found(tmp_path: Path, kind: str) -> None:
    lay_model(tmp_path / "made", kind)
    source = look_up(tmp_path / "made")
    assert (source.run_id, source.steps, source.seed) == ("a", 4, 3)
    assert source.corpora == {"text_to_code": "functions"}


@given(st.sampled_from(sorted(MODELS)), st.integers(0, 40), WOUNDS)
@budget(60, 1000)
def test_a_model_with_a_damaged_file(tmp_path: Path, kind: str, number: int, wounds: Any) -> None:
    files = lay_model(tmp_path / "made", kind)
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), wounds))
    named(lambda: look_up(tmp_path / "made"))


@given(st.sampled_from(sorted(MODELS)), st.integers(0, 40), VALUES, PLACES)
@budget(60, 1000)
def test_a_model_with_any_value_anywhere(
    tmp_path: Path, kind: str, number: int, value: Any, place: list[int]
) -> None:
    files = lay_model(tmp_path / "made", kind)
    path = files[number % len(files)]
    reported = MODELS[kind][str(path.relative_to(tmp_path / "made"))]
    path.write_text(json.dumps(replaced(reported, place, value)))
    named(lambda: look_up(tmp_path / "made"))
