"""A training step with ``training.sparse_embeddings`` against one that updates whole tables.

Both steps train the demo's configuration on the same batches of the prepared built-in corpora, in
turns: forward and backward pass, clipping and AdamW. The share of the rows that a batch uses is
counted beside them.
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from skillnet_platform import console
from skillnet_platform.storage import data_root

TASKS = ("text_classification", "text_to_image", "text_to_code")
#: Different batches of each task.
BATCHES = 8


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of the times of a step, by task."""
    from pipelines.training.config.run import FinetuneConfig
    from pipelines.training.loop.resolved_run import ResolvedRun
    from skillnet_platform import config as configuration

    data = Path(os.environ.get("SKILLNET_BENCHMARK_DATA") or data_root())
    if not (data / "headings" / "manifest.json").is_file():
        console.print_warning(f"embedding_updates needs prepared corpora; there are none in {data}")
        return []
    words = ["--config", "quickstart", "--data", str(data), "--name", "updates"]
    config = configuration.parse_config(FinetuneConfig, words, "skillnet finetune")
    loader = ResolvedRun(config).dataloader
    batches: dict[str, list[Any]] = {task: [] for task in TASKS}
    for step in range(config.training.steps):
        found = batches.get(loader.task_at(step))
        if found is not None and len(found) < BATCHES:
            found.append(loader.batch(step))
    results = []
    for task in TASKS:
        steps, parameters = {}, 0
        for name, is_sparse in (("touched rows", True), ("whole tables", False)):
            training = replace(config.training, sparse_embeddings=is_sparse)
            own = replace(config, training=training)
            steps[name], parameters = _make_step(own, task, batches[task])
        seconds = in_turns(steps, rounds, clock_for(threads))
        times = ratio(*seconds.values())
        setting = f"quickstart, {len(batches[task][0].rows)} rows, {parameters / 1e6:.1f} M weights"
        what = f"step of {task}, touched rows"
        results.append(
            Result(what, "whole tables", "ratio of times", *times, "<= 1", rounds, setting)
        )
        used = spread([_count_tokens(batch) for batch in batches[task]])
        results.append(
            Result(f"tokens in a batch of {task}", "", "different tokens", *used, rounds=BATCHES)
        )
    return results


def _make_step(config: Any, task: str, batches: list[Any]) -> tuple[Callable[[], None], int]:
    """Return a step of a model of its own, and the number of weights that the step changes."""
    import torch

    from pipelines.training.loop.freezing import trainable_parameters
    from pipelines.training.loop.gradient_sync import GradientSync
    from pipelines.training.loop.optimizer import build_optimizer, update_weights
    from pipelines.training.loop.row_updates import use_sparse_gradients
    from pipelines.training.loop.setup import build_model
    from pipelines.training.loop.step import backward_step
    from skillnet.precision import choose_precision

    settings, device = config.training, torch.device("cpu")
    model = build_model(config).train()
    precision = choose_precision(settings.precision, device)
    tables = use_sparse_gradients(model) if settings.sparse_embeddings else []
    optimizer = build_optimizer(model.named_parameters(), settings, tables)
    active = trainable_parameters(model, config)
    sync = GradientSync(active, 1, settings.bucket_mb * 2**20)
    queue = itertools.cycle(batches)

    def step() -> None:
        batch = next(queue).to(device, precision.weights)
        sync.begin(task)
        backward_step(model, batch, precision, config, sync)
        sync.finish()
        update_weights(optimizer, active[task], settings.max_grad_norm)
        optimizer.zero_grad()

    return step, sum(parameter.numel() for _, parameter in active[task])


def _count_tokens(batch: Any) -> float:
    found = [tower["tokens"].unique() for tower in batch.towers.values() if "tokens" in tower]
    return float(sum(len(tokens) for tokens in found))
