"""``skillnet finetune`` from the command line to the model, with and without Ray."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pipelines import evaluate, predict, register
from pipelines.finetune import finetune, main, run_end_to_end
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.inference import InferenceRunner
from pipelines.training.loop.run_evaluation import evaluate_run
from pipelines.training.runs import model_source
from pipelines.training.runs.bundle_manifest import read_bundle_manifest
from pipelines.training.runs.progress_log import read_metric_history
from skillnet import SkillNet
from skillnet_platform import config as configuration
from skillnet_platform.cli import run_command
from skillnet_platform.cluster import connect
from skillnet_platform.errors import UserError
from skillnet_platform.tracking import backend
from skillnet_platform.tracking.source_commit import find_source_commit
from skillnet_serving import search
from tests.helpers import readable_corpora
from tests.helpers.prepared_corpora import change_corpus
from tests.helpers.small_corpora import small_config
from tests.helpers.sockets import Listening, reachable, watched

pytestmark = pytest.mark.integration


def config_for(data: Path, **training: object) -> FinetuneConfig:
    config = small_config(data, **({"steps": 6, "log_every": 2} | training))
    config.tracking.register = False
    return config


def weights(path: str) -> dict[str, torch.Tensor]:
    return dict(SkillNet.from_pretrained(path).named_parameters())


def test_a_run_in_this_process(data: Path, run_root: Path) -> None:
    config = config_for(data, evaluate_every=4)
    config.evaluate = True
    result = finetune(config)
    assert result["step"] == 6
    run = Path(result["run"])
    assert run == run_root / "test"
    stored = configuration.build_config(
        FinetuneConfig, configuration.load_yaml(run / "config.yaml")
    )
    assert configuration.digest_config(stored.model) == configuration.digest_config(config.model)
    assert {row["task"] for row in result["evaluation"]} == set(config.tasks)

    client = backend.create_client(backend.resolve_uri())
    recorded = client.get_run(result["run_id"])
    assert recorded.info.status == "FINISHED"
    assert recorded.data.params["model.dim"] == "16"
    metrics = recorded.data.metrics
    for task in config.tasks:
        assert f"{task}/activated_params" in recorded.data.params
    assert "text_to_image/test_recall_at_10" in metrics
    assert 0 <= metrics["score"] <= 1
    assert recorded.data.tags["tasks"] == ", ".join(config.trained)
    assert recorded.data.tags["system"] == "skillnet"
    assert "text_to_image/validation_recall_at_10" in metrics
    assert "training/learning_rate" in metrics
    assert {entry.dataset.name for entry in recorded.inputs.dataset_inputs} == {
        task.corpus for task in config.tasks.values()
    }
    history = read_metric_history(run / "progress.jsonl")
    assert len(history["training/learning_rate"]) == 3
    # Every four steps, and at the last one.
    assert [step for step, _ in history["text_to_image/validation_recall_at_10"]] == [4, 6]

    again = finetune(config)
    assert again["run_id"] == result["run_id"]
    config.training.lr = 0.5
    with pytest.raises(UserError, match=r"the run test has training\.lr 0\.003, not 0\.5"):
        finetune(config)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of an undisturbed run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(tmp_path_factory.mktemp("alone")))
        return finetune(config_for(data))


class SignalSender:
    """Callback that sends a signal to this process before a step."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self._number, self._step = number, step

    def on_train_start(self, folder: Path | None, rank: int) -> None: ...

    def on_step_start(self, step: int) -> None:
        if step == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(
    ("number", "code", "step"), [(signal.SIGTERM, 143, 4), (signal.SIGINT, 130, 2)]
)
def test_a_signal_ends_a_run_in_this_process_and_the_same_command_resumes(
    number: signal.Signals,
    code: int,
    step: int,
    data: Path,
    run_root: Path,
    alone: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connect, "ensure_ray", None)
    config = config_for(data, checkpoint_every=2)

    def run(argv: list[str] | None) -> int:
        run_end_to_end(config, "finetune", callbacks=[SignalSender(number, 3)])
        return 0

    # A shell starts its background jobs with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert run_command(run, [], "pipelines.finetune") == code
    finally:
        signal.signal(signal.SIGINT, before)
    run_id = json.loads((run_root / "test" / "run.json").read_text(encoding="utf-8"))["run_id"]
    resumed = finetune(config)
    assert (resumed["resumed"], resumed["step"], resumed["run_id"]) == (step, 6, run_id)
    whole, parts = weights(alone["model"]), weights(resumed["model"])
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


class WatchedRun(NamedTuple):
    """Run of two workers of Ray, and the sockets on which its processes listened."""

    config: FinetuneConfig
    result: dict[str, Any]
    sockets: set[Listening]


@pytest.fixture(scope="module")
def two_workers(
    data: Path, ray_session: Any, tmp_path_factory: pytest.TempPathFactory
) -> WatchedRun:
    config = config_for(data, workers=2, evaluate_every=3)
    config.name, config.evaluate = "two", True
    with pytest.MonkeyPatch.context() as driver, watched() as seen:
        driver.setenv("SKILLNET_HOME", str(tmp_path_factory.mktemp("two")))
        # The driver may have no GPU, so it infers nothing.
        driver.setattr(InferenceRunner, "__init__", None)
        result = finetune(config)
    return WatchedRun(config, result, seen)


def test_two_ray_workers_listen_on_loopback_only(two_workers: WatchedRun) -> None:
    whole = " ".join(each.process for each in two_workers.sockets)
    for part in ("gcs_server", "raylet", "dashboard.py", "RayTrainWorker"):
        assert part in whole, f"{part} was not looked at"
    assert "DatasetManager" not in whole, "Ray Data has no part in a fit"
    assert reachable(two_workers.sockets) == []


def test_two_ray_workers_reach_the_same_weights(
    alone: dict[str, Any], two_workers: WatchedRun
) -> None:
    config, two, _ = two_workers
    assert two["world"] == 2
    assert two["commit"] == find_source_commit()
    whole = evaluate_run(
        config, SkillNet.from_pretrained(two["model"]), None, step=6, bootstrap_samples=1000
    )
    assert two["evaluation"] == whole
    assert (Path(two["run"]) / "outcomes.parquet").is_file()
    one, other = weights(alone["model"]), weights(two["model"])
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-9, atol=1e-9, msg=name)
    expected, found = (
        read_metric_history(Path(run["run"]) / "progress.jsonl")["text_to_image/loss"]
        for run in (alone, two)
    )
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected])
    assert not (Path(two["run"]) / "ray").exists()


def test_command_line(
    data: Path, run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(configuration.to_yaml(config_for(data)), encoding="utf-8")
    assert main(["--config", str(path), "--training.steps", "2", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 2
    assert main(["--config", str(path), "--name", "x", "--training.step", "2"]) == 2
    assert "training.steps" in capsys.readouterr().err
    assert main(["--config", str(path), "--name", "a/b"]) == 2
    assert "is no valid folder name" in capsys.readouterr().err
    assert main(["--config", str(path), "--name", "x", "--data", str(tmp_path)]) == 2
    assert "skillnet prepare" in capsys.readouterr().err
    assert not (run_root / "x").exists(), "a refused run takes no name"


def test_a_folder_that_is_no_run_is_left_alone(data: Path, run_root: Path) -> None:
    (run_root / "test").mkdir()
    (run_root / "test" / "diary.txt").write_text("mine")
    with pytest.raises(UserError, match="exists but is not a run directory"):
        finetune(config_for(data))


def test_a_run_on_two_corpora_reads_and_saves_nothing_else(
    run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = readable_corpora.write_corpora(tmp_path / "data")
    for corpus in ("syllables", "strokes", "functions"):
        shutil.rmtree(here / corpus)
    config = config_for(here, steps=1, precision="auto")
    config.model = readable_corpora.config()
    config.evaluate = config.tracking.register = True
    config.tasks = {name: config.tasks[name] for name in ("text_classification", "text_to_image")}
    result = finetune(config)
    [idle] = [name for name, counts in result["tasks"].items() if not counts["steps"]]
    said = " ".join(capsys.readouterr().err.split())
    assert f"training.steps is 1, and no step trains {idle}: random weights stay" in said
    reason = f"the task {idle} is untrained, because it took none of the 1 steps of its run"
    assert result["registered"] is None
    assert reason in said
    assert {path.stem for path in Path(result["model"]).glob("*.safetensors")} == {
        *("shared", "stem-token", "stem-patch", "head-text_classification", "head-text_to_image"),
        *("skill-general", "skill-text", "skill-image", "skill-alignment"),
    }
    words = ["--model", result["run"], "--data", str(here)]
    assert predict.main([*words, "--text", "文学研究"]) == 0
    assert search.main([*words, "红色的圆圈", "--top", "2"]) == 0
    # The command that only registers fails, where the run above has another result.
    assert register.main([result["run"], "--data", str(here)]) == 2
    assert reason in " ".join(capsys.readouterr().err.split())
    # A run is registered if each of its tasks took a step.
    config.name, config.training.steps = "longer", 4
    result = finetune(config)
    assert result["registered"]["alias"] == "champion"
    source = model_source.resolve_model(result["registered"]["uri"])
    assert source.bundle is not None
    assert set(read_bundle_manifest(source.bundle)["tasks"]) == set(config.tasks)
    words = ["--model", result["run"], "--data", str(here), "--simple_baselines", "false", "--json"]
    assert evaluate.main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["task"] for row in rows} == set(config.tasks)


def drop_tests(manifest: dict[str, Any]) -> None:
    for name in [name for name in manifest["splits"] if name.startswith("test")]:
        del manifest["splits"][name]


def test_a_run_that_cannot_be_evaluated_ends_before_its_training(
    data: Path, run_root: Path, tmp_path: Path
) -> None:
    here = tmp_path / "data"
    shutil.copytree(data, here)
    for path in here.glob("*/manifest.json"):
        change_corpus(path.parent, change=drop_tests)
    config = config_for(here)
    config.evaluate = True
    with pytest.raises(UserError, match=r"has a split 'test' .* --evaluate false"):
        finetune(config)
    assert not (run_root / "test").exists()


def test_a_failed_run_is_recorded_as_failed(data: Path, run_root: Path) -> None:
    # Decay multiplies the weights by -99 in the steps with the highest rate.
    overflow = {"lr": 10.0, "max_grad_norm": 0.0, "weight_decay": 10.0, "precision": "fp32"}
    config = config_for(data, steps=40, **overflow)
    with pytest.raises(FloatingPointError, match=r"lower training\.lr"):
        finetune(config)
    client = backend.create_client(backend.resolve_uri())
    experiment = client.get_experiment_by_name("skillnet")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    assert "not finite" in run.data.tags["failure"]
