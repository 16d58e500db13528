"""Every system trains through ``finetune``, is saved, loaded by its name, and evaluated."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipelines.finetune import finetune
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop import loop
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run
from pipelines.training.loop.setup import build_model, dry_run_init
from pipelines.training.runs.progress_log import read_metric_history
from skillnet.systems import build_system, load_model, system_names
from tests.helpers.small_corpora import small_config, small_pretraining, write_corpora
from tests.integration.ranks import run_ranks, train_and_save

pytestmark = pytest.mark.integration

OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {"size": "executed"},
    "moe": {"experts": 3},
    "specialist": {"ffn_dim": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpora(tmp_path_factory.mktemp("corpora") / "data", pretrain=20)


def config_for(data: Path, system: str, **training: object) -> FinetuneConfig:
    config = small_config(data, **({"steps": 6, "log_every": 2} | training))
    config.tracking.register = False
    config.system, config.options = system, OPTIONS.get(system, {})
    return config


@pytest.mark.parametrize("system", sorted(OPTIONS))
def test_a_run_of_each_system(system: str, data: Path, run_root: Path) -> None:
    config = config_for(data, system, precision="fp32")
    config.evaluate = True
    result = finetune(config)
    assert result["step"] == 6
    assert {row["task"] for row in result["evaluation"]} == set(config.tasks)
    assert {row["system"] for row in result["evaluation"]} == {system}
    costs = {row["task"]: row["activated_params"] for row in result["evaluation"]}
    model = load_model(result["model"])
    assert model.system == system
    assert costs == {task: model.activated_parameters(task) for task in config.tasks}
    torch.manual_seed(config.seed)
    start = dict(build_system(system, config.model, config.options).named_parameters())
    trained = set(read_metric_history(Path(result["run"]) / "progress.jsonl"))
    seen = {name.partition("/")[0] for name in trained if name.endswith("/loss")}
    for task in seen:
        changed = [not torch.equal(p, start[n]) for n, p in model.active_parameters(task)]
        assert any(changed)
    assert ("moe/router_entropy" in trained) == (system == "moe")


@pytest.mark.parametrize("system", sorted(OPTIONS))
def test_resuming_is_exact(system: str, data: Path, tmp_path: Path) -> None:
    config = config_for(data, system)
    whole = train_model(ResolvedRun(config))
    assert train_model(ResolvedRun(config, tmp_path), stop_at=3).step == 3
    parts = train_model(ResolvedRun(config, tmp_path))
    assert parts.resumed == 3
    one, other = (dict(run.model.named_parameters()) for run in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_system_that_forgets_a_file_it_trains_is_refused(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(data, "dense")
    train_model(ResolvedRun(config, tmp_path), stop_at=3)
    monkeypatch.setattr(loop, "find_used_files", lambda config: {"shared"})
    with pytest.raises(ValueError, match=r"dense: needed_files leaves out \S+, which a task"):
        train_model(ResolvedRun(config, tmp_path))


def test_two_workers_train_experts_like_one(data: Path, tmp_path: Path) -> None:
    config = config_for(data, "moe")
    # The balancing loss is that of a worker's own tokens: only it depends on their number.
    config.options = {"experts": 9, "ffn_dim": 8, "balance": 0.0, "z": 0.0}
    config.tasks["text_to_video"].batch_size = 1  # leaves the second worker without a row
    found = []
    for world in (1, 2):
        out = tmp_path / f"{world}.safetensors"
        run_ranks(world, train_and_save, config, None, str(out))
        found.append(load_file(out))
    alone, two = found
    for name in alone.keys() - {"bytes_reduced"}:
        torch.testing.assert_close(two[name], alone[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("system", sorted(OPTIONS))
def test_finetuning_starts_from_a_pretrained_system(
    system: str, data: Path, tmp_path: Path
) -> None:
    config = small_pretraining(data, steps=5, precision="fp32")
    config.system, config.options = system, OPTIONS[system]
    trained = train_model(ResolvedRun(build_joint_run(config))).model
    trained.save_pretrained(tmp_path / "pretrained")
    after = config_for(data, system)
    after.init_from = str(tmp_path / "pretrained")
    start = dry_run_init(after)
    assert start is not None
    assert all(file.startswith("head-") for file in start.fresh)
    source = dict(trained.named_parameters())
    for name, parameter in build_model(after).named_parameters():
        if not name.startswith("heads."):
            own = name if name in source else ".".join(_pretrained(name, after))
            assert torch.equal(parameter, source[own]), name


def _pretrained(name: str, config: FinetuneConfig) -> list[str]:
    _, task, tower, *rest = name.split(".")
    return ["pretrained", config.model.tasks[task].towers[tower].modality, *rest]


@pytest.mark.parametrize(
    ("system", "options", "words"),
    [
        ("dens", {}, "did you mean 'dense'"),
        ("dense", {"sise": "executed"}, "did you mean 'size'"),
        ("specialist", {"checkpoints": {"text": "/none"}}, "neither a folder nor in the cache"),
    ],
)
def test_errors_are_named_before_anything_starts(
    system: str, options: dict[str, Any], words: str, data: Path, run_root: Path
) -> None:
    config = config_for(data, system)
    config.options = options
    with pytest.raises(ValueError, match=words):
        finetune(config)
    assert not (run_root / "test").exists(), "a rejected run reserves no name"


@pytest.fixture
def bag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third-party package whose entry point names a system, as pip leaves it."""
    package = Path(__file__).parents[1] / "systems_package"
    project = tomllib.loads((package / "pyproject.toml").read_text("utf-8"))["project"]
    ((name, value),) = project["entry-points"]["skillnet.systems"].items()
    about = tmp_path / "installed" / "bag-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: bag\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[skillnet.systems]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.syspath_prepend(about.parent)


@pytest.mark.usefixtures("bag")
def test_a_third_party_system_is_trained_by_its_name(data: Path, run_root: Path) -> None:
    assert "bag" in system_names()
    config = config_for(data, "bag", steps=5)
    config.options, config.evaluate = {"layers": 2}, True
    result = finetune(config)
    assert {row["system"] for row in result["evaluation"]} == {"bag"}
    assert {row["task"] for row in result["evaluation"]} == set(config.tasks)
    model = load_model(result["model"], "text_to_video")
    assert model.options == {"layers": 2}
    weights = {name for name, _ in model.named_parameters() if name.startswith("layers.")}
    assert weights == {f"layers.{n}.0.{what}" for n in (0, 1) for what in ("weight", "bias")}
    config.name, config.options = "other", {"layer": 2}
    with pytest.raises(ValueError, match="system bag: unknown option 'layer'; did you mean"):
        finetune(config)
