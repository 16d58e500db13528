"""Steps of ``make gpu``: time, rate, MFU and memory of each task beside the plan, and traces."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks.gpu.bench import GpuBench
from benchmarks.measure import Result, Spread, plain, spread
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loop.compilation import compile_layers
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.optimizer import build_optimizer, update_weights
from pipelines.training.loop.setup import trainable_parameters
from pipelines.training.loop.step import backward_step
from skillnet.multitask_model import TaskModel
from skillnet.precision import choose_precision
from skillnet.systems import build_system
from skillnet_planning.example_batches import build_example_batch
from skillnet_planning.measurements import describe_step
from skillnet_planning.memory_plan import RunPlanner
from skillnet_platform.cluster.gpu_types import GB

#: Rows of a step, and rows that are computed at a time; None computes all at once.
BATCHES: tuple[tuple[int, int | None], ...] = (
    (128, None),
    (128, 32),
    (32, None),
    (64, None),
    (512, None),
)
TINY_BATCHES: tuple[tuple[int, int | None], ...] = ((4, None), (8, 4))
WARM_UP = 3


class StepRunner:
    """Steps of a model, as the training loop does them for one worker.

    Args:
        config: settings of the run.
        device: where the model is.
        model: is trained; None builds the one of the configuration.

    ``compile_s`` is the time of its compilation in seconds.
    """

    def __init__(
        self, config: FinetuneConfig, device: torch.device, model: TaskModel | None = None
    ) -> None:
        self._config, self._device = config, device
        if model is None:
            torch.manual_seed(0)
            with device:
                model = build_system(config.system, config.model, config.options)
        self.model = model.train()
        training = config.training
        self.model.limit_kept_tokens(training.kept_tokens)
        self._precision = choose_precision(training.precision, device)
        self._active = trainable_parameters(self.model, config)
        began = time.perf_counter()
        if training.compile:
            compile_layers(config, self.model, self.model, self._precision)
        self.compile_s = time.perf_counter() - began
        trained = dict(pair for pairs in self._active.values() for pair in pairs)
        self.optimizer = build_optimizer(trained.items(), training)
        self._sync = GradientSync(self._active, 1)

    def make_step(self, task: str, rows: int, part: int | None) -> Callable[[], None]:
        """Return a function that does a step on a batch of the longest rows.

        Args:
            task: name of the task.
            rows: rows of the step.
            part: rows that are computed at a time; None computes all at once.
        """
        training = replace(self._config.training, micro_batch_size=part)
        config = replace(self._config, training=training)
        batch = build_example_batch(config, task, rows, rows)
        example = batch.to(self._device, self._precision.weights)

        def step() -> None:
            self._sync.begin(task, False)
            backward_step(self.model, example, self._precision, config, self._sync)
            self._sync.finish()
            update_weights(self.optimizer, self._active[task], training.max_grad_norm)
            self.optimizer.zero_grad()

        return step


def measure_steps(
    bench: GpuBench, preset: str, task: str, is_compiled: bool = False
) -> Iterator[Result]:
    """Yield time, rows per second, MFU and memory of the steps of a task.

    Args:
        bench: device and sizes.
        preset: see :meth:`GpuBench.read_preset`.
        task: name of the task.
        is_compiled: compile the model.
    """
    config = bench.read_preset(preset)
    training = replace(config.training, compile=is_compiled, use_gpu=bench.is_gpu)
    # Only this task: the others would have averages of Adam, too.
    config = replace(config, training=training, tasks={task: config.tasks[task]})
    runner: StepRunner | None = None
    for rows, part in TINY_BATCHES if bench.is_rehearsal else BATCHES:
        runner = runner or StepRunner(config, bench.device)
        sized = replace(config.tasks[task], batch_size=rows)
        own = replace(
            config,
            training=replace(training, micro_batch_size=part),
            tasks={task: sized},
        )
        setting = describe_step(own, task, rows, part, is_compiled)
        name = f"{preset}, {task}"
        step: Callable[[], None] | None
        try:
            step = runner.make_step(task, rows, part)
            began = time.perf_counter()
            step()
            bench.synchronize()
            first = time.perf_counter() - began
            seconds = time_steps(bench, step)
        except torch.OutOfMemoryError:
            note = "out of memory"
            yield plain(name, "s per step", float("nan"), setting=setting, note=note)
            # Its gradients are half summed, so the next batch gets another model.
            step, runner = None, None
            torch.cuda.empty_cache()
            continue
        yield Result(name, "", "s per step", *spread(seconds), "", bench.rounds, setting)
        yield plain(name, "s of the compilation", runner.compile_s, setting=setting)
        yield plain(name, "s of the first step", first, setting=setting)
        yield Result(name, "", "rows per second", *_inverse(seconds, rows), setting=setting)
        planner = RunPlanner(own, bench.card, 1)
        cost, passes = planner.measure(task, planner.given)
        if bench.card.bf16_tflops:
            work = passes * cost.flops / (bench.card.bf16_tflops * 1e12)
            against = f"peak of {bench.card.name}"
            yield Result(name, against, "MFU", *_inverse(seconds, work), setting=setting)
        yield plain(name, "operations", passes * len(cost.operations), setting=setting)
        if bench.is_gpu:
            peak = torch.cuda.max_memory_allocated(bench.device) / GB
            reserved = torch.cuda.max_memory_reserved(bench.device) / GB
            yield plain(name, "GB at the peak", peak, setting=setting)
            yield plain(name, "GB reserved", reserved, setting=setting)
            planned = (planner.memory().fixed + cost.peak_bytes) / GB
            yield plain(name, "GB of the plan", planned, setting=setting)


def trace_steps(bench: GpuBench, preset: str) -> Iterator[Result]:
    """Yield what torch's profiler says of one step of each task; write the traces beside the rows.

    Args:
        bench: device and sizes.
        preset: see :meth:`GpuBench.read_preset`.
    """
    from torch.profiler import ProfilerActivity, profile

    config = bench.read_preset(preset)
    runner = StepRunner(config, bench.device)
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * bench.is_gpu]
    rows, part = (TINY_BATCHES if bench.is_rehearsal else BATCHES)[0]
    for task in config.trained:
        step = runner.make_step(task, rows, part)
        for _ in range(WARM_UP):
            step()
        bench.synchronize()
        with profile(activities=activities) as profiler:
            began = time.perf_counter()
            step()
            host = time.perf_counter() - began
            bench.synchronize()
            wall = time.perf_counter() - began
        bench.output.mkdir(parents=True, exist_ok=True)
        path = bench.output / f"trace-{preset}-{task}.json.gz"
        profiler.export_chrome_trace(str(path))
        kernels = [each for each in profiler.events() or () if each.device_type.name == "CUDA"]
        busy = sum(each.self_device_time_total for each in kernels) / 1e6
        name, setting = f"{preset}, {task}", f"{rows} rows, {part or rows} at a time"
        yield plain(name, "ms of the host", 1e3 * host, setting=setting, note=path.name)
        yield plain(name, "kernels", len(kernels), setting=setting)
        yield plain(name, "share of the step that kernels take", busy / wall, setting=setting)


def time_steps(bench: GpuBench, step: Callable[[], object]) -> list[float]:
    """Return the seconds of each step, after some of warm-up.

    Args:
        bench: its device is waited for before and after each step.
        step: a training step.
    """
    for _ in range(WARM_UP):
        step()
    bench.synchronize()
    if bench.is_gpu:
        torch.cuda.reset_peak_memory_stats(bench.device)
    seconds = []
    for _ in range(bench.rounds):
        began = time.perf_counter()
        step()
        bench.synchronize()
        seconds.append(time.perf_counter() - began)
    return seconds


def _inverse(seconds: Sequence[float], amount: float) -> Spread:
    return spread([amount / each for each in seconds])
