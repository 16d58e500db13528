"""Random damage to a run's folder: the same command resumes, or reports the damage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.finetune import finetune
from pipelines.training.config.run import FinetuneConfig
from skillnet.serialization import write_manifest
from tests.chaos.fault_injection import finetune_with_faults
from tests.chaos.run_measures import same, tensors
from tests.helpers.random_damage import PLACES, VALUES, WOUNDS, budget, damaged, named, replaced
from tests.helpers.small_corpora import small_config, write_corpora

pytestmark = [pytest.mark.fuzz, pytest.mark.integration]

STEPS = 6


class Run:
    """A run that ended with an error after step 5, and its state after it resumed.

    Args:
        root: for all that it needs.
    """

    def __init__(self, root: Path) -> None:
        config = small_config(
            write_corpora(root / "data"), steps=STEPS, checkpoint_every=2, log_every=1
        )
        config.tasks = {"text_classification": config.tasks["text_classification"]}
        config.name, config.run_dir = "made", str(root / "runs")
        config.tracking.uri = f"sqlite:///{root}/mlflow.db"
        config.tracking.register = False
        self.config: FinetuneConfig = config
        self.folder = root / "runs" / "made"
        self._kept = root / "kept"
        with pytest.raises(RuntimeError, match="an injected fault"):
            finetune_with_faults(config, {"step": 5, "kind": "raise"})
        shutil.copytree(self.folder, self._kept / "stopped")
        finetune(config)
        shutil.copytree(self.folder, self._kept / "finished")
        self._weights = tensors(self.folder, STEPS)

    def be(self, state: str) -> list[Path]:
        """Make the folder what it was: ``stopped`` or ``finished``. Its files."""
        shutil.rmtree(self.folder)
        shutil.copytree(self._kept / state, self.folder)
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def go_on(self) -> None:
        """Give the same command again.

        Raises:
            UserError: what is wrong with the folder.
            AssertionError: it resumed to other weights.
        """
        finetune(self.config)
        assert same(tensors(self.folder, STEPS), self._weights)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("fuzz"))


@given(st.integers(0, 40), WOUNDS)
@budget(4, 50)
def test_a_stopped_run_with_a_damaged_file(run: Run, number: int, wounds: Any) -> None:
    files = run.be("stopped")
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), wounds))
    named(run.go_on)


@given(st.integers(0, 40), VALUES, PLACES, st.booleans())
@budget(4, 50)
def test_a_stopped_run_with_any_value_anywhere(
    run: Run, number: int, value: Any, place: list[int], sealed: bool
) -> None:
    files = [path for path in run.be("stopped") if path.suffix in (".json", ".jsonl")]
    path = files[number % len(files)]
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    reported = [json.dumps(replaced(json.loads(line), place, value)) for line in lines]
    path.write_text("\n".join(reported) + "\n")
    if sealed and path.parent.name.startswith("step-") and path.name != "manifest.json":
        names = [each.name for each in path.parent.iterdir() if each.name != "manifest.json"]
        write_manifest(path.parent, names)
    # What a checkpoint says of itself may be another truth; its numbers may then be others.
    if path.parent.name.startswith("step-"):
        named(lambda: finetune(run.config))
    else:
        named(run.go_on)


@given(st.integers(0, 40), WOUNDS)
@budget(12, 50)
def test_a_finished_run_with_a_damaged_file(run: Run, number: int, wounds: Any) -> None:
    files = run.be("finished")
    path = files[number % len(files)]
    path.write_bytes(damaged(path.read_bytes(), wounds))
    named(lambda: finetune(run.config))


@given(VALUES, PLACES)
@budget(12, 50)
def test_a_finished_run_whose_result_has_any_value_anywhere(
    run: Run, value: Any, place: list[int]
) -> None:
    run.be("finished")
    path = run.folder / "result.json"
    path.write_text(json.dumps(replaced(json.loads(path.read_text()), place, value)))
    named(lambda: finetune(run.config))
