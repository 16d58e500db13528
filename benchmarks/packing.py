"""Training steps of the demo with packed tokens, against the same steps on padded rows.

Every step is forward and backward pass, clipping and AdamW on a batch of the demo's schedule, with
its stochastic depth. The contender computes padding: the same layers without packing, as a plain
Transformer does. Both see a batch for the first time, because oneDNN compiles a kernel for each
shape of a product. Needs the prepared corpora of ``skillnet quickstart``.
"""

import collections
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.measure import Result, clock_for, ratio
from pipelines.quickstart import QuickstartConfig
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.optimizer import build_optimizer, clip_gradients
from pipelines.training.loop.resolved_run import ResolvedRun
from pipelines.training.loop.setup import build_model
from pipelines.training.loop.step import step_loss
from skillnet import encoder
from skillnet.precision import choose_precision
from skillnet.skills import find_task
from skillnet_platform import config as configuration

#: Steps of each task before the clock starts.
WARMUP = 6
#: Largest share of real tokens that are packed, by contender.
SHARES = {"packed": encoder.PACKED_SHARE, "padded": -1.0}


def demo_config() -> QuickstartConfig:
    """Return the settings of ``skillnet quickstart`` with the corpora of the benchmark."""
    words = ["--config", "quickstart", "--name", "packing"]
    if folder := os.environ.get("SKILLNET_BENCHMARK_DATA"):
        words += ["--data", str(Path(folder))]
    return configuration.parse_config(QuickstartConfig, words, "python -m benchmarks packing")


class DemoStep:
    """A training step of the demo's model; calling it does one."""

    def __init__(self, run: ResolvedRun) -> None:
        self._config = run.config
        self._precision = choose_precision("auto", torch.device("cpu"))
        self.model = build_model(run.config, run.corpora).train()
        self._parameters = list(self.model.named_parameters())
        self._optimizer = build_optimizer(self._parameters, run.config.training)

    def __call__(self, batch: Batch) -> None:
        """Update the weights by one batch."""
        task = find_task(batch.task, self.model.config.tasks)
        step_loss(self.model, task, batch, self._precision, self._config).backward()
        clip_gradients((p for _, p in self._parameters if p.grad is not None), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def run(rounds: int, threads: int) -> list[Result]:
    """Time the steps of each task, and weigh them as the schedule does."""
    demo = ResolvedRun(demo_config())
    steps = collections.defaultdict(list)
    for step in range(demo.config.training.steps):
        steps[demo.dataloader.batch_spec(step).task].append(step)
    # One model for both sides: neither has other weights, caches or memory.
    train, clock = DemoStep(demo), clock_for(threads)
    results = []
    totals = {name: [0.0] * rounds for name in SHARES}
    for task, numbers in steps.items():
        seconds: dict[str, list[float]] = {name: [] for name in SHARES}
        for index, batch in enumerate(_spread_batches(demo, numbers, WARMUP + rounds)):
            for name in sorted(SHARES, reverse=index % 2 == 1):
                encoder.PACKED_SHARE = SHARES[name]
                begin = clock()
                train(batch)
                seconds[name].append(clock() - begin)
        measured = {name: values[WARMUP:] for name, values in seconds.items()}
        for name, values in measured.items():
            for index, value in enumerate(values):
                totals[name][index] += value * len(numbers)
        results.append(_compare(f"step of {task}", measured, rounds, "<= 1.02"))
    encoder.PACKED_SHARE = SHARES["packed"]
    return [_compare("the demo's schedule", totals, rounds, "<= 0.8"), *results]


def _spread_batches(run: ResolvedRun, numbers: list[int], count: int) -> Iterator[Batch]:
    """Load batches of one task, evenly spread over the schedule."""
    for index in range(count):
        yield run.dataloader.batch(numbers[index * len(numbers) // count])


def _compare(measured: str, seconds: dict[str, list[float]], rounds: int, target: str) -> Result:
    found = ratio(seconds["packed"], seconds["padded"])
    return Result(
        f"{measured}, packed",
        "padded",
        "ratio",
        *found,
        target,
        rounds,
        setting="preset quickstart",
    )
