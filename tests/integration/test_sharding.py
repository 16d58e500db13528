"""Sharded training reaches the weights of one process, and gathers only what a step activates."""

import json
import platform
from collections import Counter
from dataclasses import replace
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop import loop, setup, sharding
from pipelines.training.loop.loop import train_model
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.worker import MODEL, FinalEvaluation, run_worker
from pipelines.training.runs.layout import TRAINED
from skillnet import serialization
from skillnet.serialization import check_file, read_manifest
from skillnet.systems import load_model
from tests.helpers.small_corpora import (
    add_linear_paths,
    small_config,
    small_pretraining,
)
from tests.integration.ranks import run_ranks

pytestmark = pytest.mark.integration


class GatheredBytes(TorchDispatchMode):
    """Counter of the bytes that this rank gathers, for each step of a training."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.marks = 0, dict[int, int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == "c10d::_allgather_base_":
            self.total += args[0].nbytes
        return func(*args, **(kwargs or {}))

    def on_train_start(self, folder: Path | None, rank: int) -> None:
        pass

    def on_step_start(self, step: int) -> None:
        self.marks[step] = self.total

    def of_step(self, step: int) -> int:
        return self.marks[step + 1] - self.marks[step]


def train_first_steps(rank: int, world: int, config: FinetuneConfig, run: str, steps: int) -> None:
    """Train with a count of the gathered bytes, and leave a checkpoint."""
    with GatheredBytes() as gathered:
        resolved = ResolvedRun(config, Path(run))
        result = train_model(resolved, rank=rank, world=world, stop_at=steps, callbacks=[gathered])
    assert result.shards is not None
    weights = dict(build_model(config).double().named_parameters())
    whole = sum(p.nbytes for p in weights.values())
    for step in range(steps - 1):
        task = resolved.dataloader.batch_spec(step).task
        active = sum(weights[name].nbytes for name, _ in result.model.active_parameters(task))
        assert active <= gathered.of_step(step) <= 1.02 * active < whole, (task, step)
    if rank == 0:
        assert result.checkpoint is not None
        # The same files as without shards.
        files = read_manifest(result.checkpoint)["files"].keys()
        kinds = ("", "optimizer-", "average-")
        names = {f"{kind}{file}.safetensors" for kind in kinds for file in result.model.files_of()}
        assert {f"{kind}skill-text.safetensors" for kind in kinds} < files
        assert files <= names | {"config.json", "state.json"}
    held = sum(part.nbytes for part in result.shards.parameters.values())
    assert held < 1.05 * whole / world
    # Autocast merges weights in another way, and layers may share weights.
    for system in ("skillnet", "dense"):
        rounded = replace(config, system=system)
        rounded.model = replace(config.model, skill_modules="feedforward")
        is_dense = system == "dense"
        rounded.training = replace(
            config.training, steps=2, precision="bf16", kept_tokens=0 if is_dense else None
        )
        losses = train_model(ResolvedRun(rounded), rank=rank, world=world).losses
        assert losses
        assert all(isfinite(loss) for loss in losses.values())


def train_rounded(rank: int, world: int, config: FinetuneConfig) -> None:
    """Gather weights in their own type, and in that of the products that round them."""
    shard_model, found = sharding.shard_model, []
    for changed in ({"products": None}, {}):
        wrapped = mock.patch.object(
            sharding, "shard_model", lambda *a, c=changed, **k: shard_model(*a, **k | c)
        )
        with GatheredBytes() as gathered, wrapped:
            result = train_model(ResolvedRun(config), rank=rank, world=world, callbacks=[gathered])
        assert result.shards is not None
        found.append((result.losses, result.shards.parameters, gathered.of_step(0)))
    (losses, expected, whole), (rounded_losses, parameters, rounded) = found
    assert rounded_losses == losses
    torch.testing.assert_close(parameters, expected, rtol=0, atol=0)
    model = build_model(config)
    names = sharding.find_rounded_weights(model)
    saved = 2 * sum(model.get_parameter(name).numel() for name in names)
    assert saved <= whole - rounded <= 1.02 * saved


def test_weights_are_gathered_in_the_type_of_products(data: Path) -> None:
    """Of one skill and one tower, so that each weight is rounded once, by the cast or the sum."""
    config = small_config(data, steps=3, precision="bf16", sharding="full")
    task = "text_classification"
    config.system, config.tasks = "dense", {task: config.tasks[task]}
    config.model = replace(config.model, tasks={task: config.model.tasks[task]})
    run_ranks(2, train_rounded, config)


def finish_run(rank: int, world: int, config: FinetuneConfig, run: str, brief: bool = True) -> None:
    """Train and evaluate; without figures if ``brief``."""
    Path(run).mkdir(exist_ok=True)
    run_worker(ResolvedRun(config, Path(run)), rank, world, final=FinalEvaluation(brief=brief))


def finish_resumed(rank: int, world: int, config: FinetuneConfig, run: str) -> None:
    """Finish a run whose checkpoint makes initial weights superfluous. One rank hashes it, once."""
    drawn = mock.patch.object(
        setup, "build_model", side_effect=AssertionError("weights were drawn")
    )
    hashed = mock.patch.object(serialization, "hash_file", wraps=serialization.hash_file)
    with drawn, hashed as hash_file:
        finish_run(rank, world, config, run)
    paths = [call.args[0] for call in hash_file.call_args_list]
    weights = [path for path in paths if path.suffix == ".safetensors"]
    read = Counter(path.name for path in weights if path.parent.name == "step-00000007")
    assert set(read.values()) == (set() if rank else {1}), read


def read_rows(run: Path) -> list[dict[str, Any]]:
    rows = json.loads((run / TRAINED).read_text())["evaluation"]
    return [{key: row[key] for key in ("task", "split", "metric", "value")} for row in rows]


def weights_of(run: Path) -> dict[str, Tensor]:
    manifest = read_manifest(run / MODEL)
    for name in manifest["files"]:
        check_file(run / MODEL, name, manifest)
    return dict(load_model(run / MODEL).named_parameters())


def assert_equal_runs(found: Path, expected: Path) -> None:
    weights = weights_of(expected)
    for name, value in weights_of(found).items():
        torch.testing.assert_close(value, weights.pop(name), rtol=1e-9, atol=1e-9, msg=name)
    assert not weights


@pytest.mark.long
def test_two_then_four_ranks_equal_one_process(data: Path, tmp_path: Path) -> None:
    config = add_linear_paths(small_config(data, steps=10, ema=0.9, max_grad_norm=0.5))
    config.evaluate = True
    finish_run(0, 1, config, str(tmp_path / "alone"))
    config.training.sharding = "full"
    run_ranks(2, train_first_steps, config, str(tmp_path / "run"), 7)
    run_ranks(4, finish_resumed, config, str(tmp_path / "run"))
    assert_equal_runs(tmp_path / "run", tmp_path / "alone")
    assert read_rows(tmp_path / "run") == read_rows(tmp_path / "alone")
    files = read_manifest(tmp_path / "run" / MODEL)["files"].keys()
    assert {"skill-text.safetensors", "stem-token.safetensors"} <= files


#: Tokens, an encoder with buffers, and two towers.
FEW_TASKS = ("text_classification", "speech_recognition", "text_to_image")

#: System -> its options.
SYSTEMS: dict[str, dict[str, Any]] = {
    # The balancing loss is that of a worker's own tokens, so it depends on their number.
    "moe": {"experts": 4, "balance": 0.0, "z": 0.0},
    "alone": {},
    "specialist": {"ffn_dim": 8},
}


def finish_systems(rank: int, world: int, config: FinetuneConfig, folder: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    for system, options in SYSTEMS.items():
        # Layers of experts and of libraries compute their forward pass again.
        is_deep = world > 1 and system != "alone"
        training = replace(config.training, kept_tokens=0 if is_deep else None)
        own = replace(config, system=system, options=options, training=training)
        finish_run(rank, world, own, f"{folder}/{system}")


@pytest.mark.slow("test_sharding.py::test_two_then_four_ranks_equal_one_process")
def test_other_systems_equal_one_process(data: Path, tmp_path: Path) -> None:
    """Experts, a model for each task, and encoders of libraries."""
    config = small_config(data, steps=5)
    config.tasks = {task: config.tasks[task] for task in FEW_TASKS}
    config.model = replace(config.model, tasks={t: config.model.tasks[t] for t in FEW_TASKS})
    config.evaluate = True
    finish_systems(0, 1, config, str(tmp_path / "alone"))
    config.training.sharding = "full"
    run_ranks(2, finish_systems, config, str(tmp_path / "run"))
    for system in SYSTEMS:
        assert_equal_runs(tmp_path / "run" / system, tmp_path / "alone" / system)
        assert read_rows(tmp_path / "run" / system) == read_rows(tmp_path / "alone" / system)


def compare_compiled(rank: int, world: int, config: FinetuneConfig) -> None:
    """Train without and with compilation: all layers of the plan share one graph."""
    # The ranks of other tests start seconds earlier without the compiler.
    from torch._dynamo.utils import counters

    expected = train_model(ResolvedRun(config), rank=rank, world=world)
    loop.compile_layers = partial(loop.compile_layers, backend="aot_eager")
    config.training.compile = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = train_model(ResolvedRun(config), rank=rank, world=world)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-9, atol=1e-9)
    assert found.shards is not None
    assert expected.shards is not None
    torch.testing.assert_close(
        found.shards.parameters, expected.shards.parameters, rtol=1e-9, atol=1e-9
    )


@pytest.mark.slow("test_sharding.py::test_two_then_four_ranks_equal_one_process")
def test_compiled_layers_equal_plain_ones(data: Path) -> None:
    """Weights are freed after each layer and gathered again, which the graphs must not notice."""
    config = small_config(data, steps=3, kept_tokens=0, sharding="full")
    task = "text_classification"
    # Each rank has several rows: one row needs a graph of its own.
    config.tasks = {task: replace(config.tasks[task], batch_size=9)}
    config.model = replace(config.model, tasks={task: config.model.tasks[task]})
    run_ranks(2, compare_compiled, config)


def finish_on_nodes(rank: int, world: int, config: FinetuneConfig, run: str) -> None:
    platform.node = lambda: f"node-{rank // 2}"
    finish_run(rank, world, config, run, brief=False)


def test_hybrid_equals_one_process(data: Path, tmp_path: Path) -> None:
    """Two nodes; masked tasks, whose head reads the token embedding; views; parts; frozen files."""
    trainable = ["shared", "skill-text", "skill-alignment", "stem-token", "head-views_image"]
    given = small_pretraining(data, steps=6, trainable=trainable)
    given.views = True
    config = given.joint()
    # Ranks have 3, 2, 2 and 2 rows, but equally many parts.
    config.tasks = {name: replace(task, batch_size=9) for name, task in config.tasks.items()}
    finish_run(0, 1, config, str(tmp_path / "alone"))
    config.training.micro_batch_size, config.training.kept_tokens = 2, 0
    config.training.sharding = "hybrid"
    run_ranks(4, finish_on_nodes, config, str(tmp_path / "run"))
    assert_equal_runs(tmp_path / "run", tmp_path / "alone")
