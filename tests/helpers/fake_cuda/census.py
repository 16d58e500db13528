"""Census of training steps and inference on fake CUDA tensors: waits, copies and operations.

    python -m tests.helpers.fake_cuda.census LIBRARY CORPORA OUT.json [PART OF THE NAME OF A CASE]

:mod:`tests.unit.pipelines.training.test_fake_cuda` runs it once and reads the result. A step does
the same as the training loop: it takes a batch of the real data loader, and calls the functions
that the loop calls.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    from tests.helpers.fake_cuda.library import load_library

    load_library(Path(sys.argv[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Module
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.gpu.step_parts import StepRunner
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.evaluation.inference import InferenceRunner, memory_inputs
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.optimizer import WeightAverage, build_optimizer, update_weights
from pipelines.training.loop.resolved_run import ResolvedRun, build_joint_run
from pipelines.training.loop.setup import trainable_parameters
from pipelines.training.loop.step import backward_step
from pipelines.training.loop.task_groups import TaskGroups
from pipelines.training.loop.task_health import TaskHealth
from pipelines.training.loop.telemetry import ThroughputMeter
from skillnet.config import SkillNetConfig
from skillnet.model_merging import add_skill, add_task
from skillnet.multitask_model import TaskModel
from skillnet.precision import ComputePrecision
from skillnet.skills import SkillPlan, Task
from skillnet.skipped_init import SkippedInit
from skillnet.systems import build_system
from skillnet_planning.example_batches import build_example_batch
from skillnet_planning.fake_weights import replace_weights
from tests.helpers.fake_cuda.offloading import measure_offloaded_steps
from tests.helpers.fake_cuda.watch import DeviceWatch, answer_values
from tests.helpers.small_corpora import small_config, small_pretraining

CUDA = torch.device("cuda", 0)
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "skillnet": ("skillnet", {}),
    "dense": ("dense", {}),
    # Grouped products pad experts whose width is no multiple of 8.
    "moe": ("moe", {"ffn_dim": 144}),
    "specialist": ("specialist", {}),
    "specialist-roberta-ast": (
        "specialist",
        {"text": "roberta", "code": "roberta", "sound": "ast"},
    ),
}
#: Tasks whose batches are also computed in checkpointed parts, one for each objective.
IN_PARTS = ("text_classification", "speech_recognition", "text_to_image", "masked_code")
#: Tasks whose batches also come with stored pixels, which the device changes.
WITH_PIXELS = ("text_to_image", "text_to_video", "masked_image", "masked_video", "views_image")
#: Name of the case that shows that waits are seen.
WAITING_ON_PURPOSE = "waiting on purpose"
#: Skills of models whose inactive weights lie in the host's memory.
OFFLOADED_SKILLS = (7, 200)
#: Ranks of the fake process group.
WORLD = 8
#: The layers of configs/base.yaml, with inputs of one token: almost all bytes that operations move
#: are those of weights.
BASE = {"dim": 768, "num_layers": 12, "num_heads": 12, "ffn_dim": 3072, "embedding_dim": 512}
ONE_TOKEN = {"max_tokens": 1, "image_size": 4, "patch_size": 4, "vocab_size": 8}
#: Tasks that are also counted at the size of configs/base.yaml: of one tower, and of two.
AT_BASE_SIZE = ("text_classification", "text_to_image")


@dataclass
class StepOptions:
    """Differences of a step to the plain one."""

    precision: str = "bf16"
    world: int = 1
    micro_batch_size: int | None = None
    checkpointing: bool = False


class StepCensus:
    """Steps of one run on fake CUDA tensors.

    Args:
        config: settings of the run; its corpora exist.
        system: key of :data:`SYSTEMS`.
        mode: fake tensors.
    """

    def __init__(self, config: FinetuneConfig, system: str, mode: FakeTensorMode) -> None:
        name, options = SYSTEMS[system]
        self.config = replace(config, system=name, options=options)
        self._mode = mode
        with torch.device("meta"), SkippedInit():
            self.model: TaskModel = build_system(name, config.model, options)
        with mode:
            replace_weights(self.model, CUDA)
        self.model.train()

    def measure(self, batch: Batch, options: StepOptions) -> dict[str, Any]:
        """Return what a step on a batch does, after the first steps of its parameters."""
        training = replace(self.config.training, micro_batch_size=options.micro_batch_size)
        config = replace(self.config, training=training)
        model, precision = self.model, ComputePrecision(options.precision, CUDA)
        if options.checkpointing:
            model.limit_kept_tokens(0)
        with self._mode:
            active = trainable_parameters(model, config)
            optimizer = build_optimizer(model.named_parameters(), training)
            average = WeightAverage(0.99)
            sync = GradientSync(active, options.world, 2**20)
            health = TaskHealth(config.tasks, "", options.world, CUDA)
            meter = ThroughputMeter(config, TaskGroups([config.tasks], 0, options.world), CUDA)
            average.update(active[batch.task])
            for _, parameter in active[batch.task]:
                moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.zeros((), device=CUDA), **moments}
            with DeviceWatch() as watch:
                on_device = batch.to(CUDA, precision.weights)
                sync.begin(batch.task)
                loss = backward_step(
                    model, on_device, precision, config, sync, 0, options.world, health
                )
                sync.finish()
                of_passes = watch.nbytes
                norm, is_finite = update_weights(optimizer, active[batch.task], 1.0, average)
                health.add_step(batch.task, batch.global_rows, is_finite, 0)
                meter.add_batch(on_device, loss, is_finite)
                meter.end_step([batch.task], norm, 1e-3)
        tensors = [*model.parameters(), *model.buffers(), *average.values.values()]
        tensors += [x for state in optimizer.state.values() for x in state.values()]
        assert all(x.device == CUDA for x in tensors)
        return describe(watch) | {"megabytes": round(of_passes / 1e6)}

    def infer(self, task: str, batch: Batch) -> dict[str, Any]:
        """Return what the inference of one batch does."""
        runner = InferenceRunner(self.model, "bf16")
        spec = self.config.model.tasks[task]
        with self._mode, DeviceWatch() as watch:
            if spec.objective == "masked":
                with runner.inference():
                    runner.model(batch.task, batch.to(CUDA).towers)["predicted"].cpu()
            elif spec.objective == "ctc":
                with torch.no_grad(), runner.precision.autocast():
                    self.model(task, batch.to(CUDA).towers)["log_probs"].cpu()
            else:
                tower = "candidate" if spec.objective == "retrieval" else "input"
                plan = spec.towers[tower]
                name = {"image": "pixels", "video": "frames"}.get(plan.modality, "tokens")
                rows = [np.asarray(row) for row in batch.towers[tower][name]]
                inputs = memory_inputs(rows, plan, self.config.model)
                if spec.objective == "retrieval":
                    runner.embed(task, tower, inputs)
                else:
                    runner.predict_rows(task, inputs)
        return describe(watch)

    def grow(self, task: str) -> None:
        """Add a skill, and a task like an existing one that uses it."""
        like = self.config.model.tasks[task]
        plan = like.towers["input"]
        # A fake parameter cannot be replaced in place, so the move of new modules is imitated.
        move = mock.patch.object(Module, "to", lambda module, *_: replace_weights(module, CUDA))
        with self._mode, DeviceWatch(), SkippedInit(), move:
            add_skill(self.model, "music", "general")
            towers = {"input": SkillPlan(("general", "music"), plan.modality)}
            add_task(self.model, "grown", Task(like.objective, towers, outputs=like.outputs))
        tasks = {**self.config.tasks, "grown": self.config.tasks[task]}
        self.config = replace(self.config, model=self.model.config, tasks=tasks)


def describe(watch: DeviceWatch) -> dict[str, Any]:
    """Return the record of a watch as plain values."""
    return {
        "waits": dict(watch.waits),
        "blocking_copies": watch.blocking_copies,
        "cpu_operations": dict(watch.cpu_operations),
        "operations": watch.operations,
        "biased": watch.biased,
    }


def first_batches(config: FinetuneConfig, for_gpu: bool = False) -> dict[str, Batch]:
    """Return task -> its first batch of the real data loader."""
    loader, found = ResolvedRun(config).dataloader, {}
    for step in range(1000):
        task = loader.batch_spec(step).task
        if task not in found:
            found[task] = loader.batch(step, for_gpu=for_gpu)
        if len(found) == len(config.trained):
            break
    return found


def wait_on_purpose() -> dict[str, Any]:
    """Return the record of code that waits in each way that a step of this project once did."""
    with FakeTensorMode(allow_non_fake_inputs=True), DeviceWatch() as watch:
        x = torch.empty(4, 3, device=CUDA, requires_grad=True)
        mask = torch.empty(4, dtype=torch.bool, device=CUDA)
        bool(torch.isfinite(x.norm()))
        x[mask].sum().backward()  # the mask is counted in both directions
        mask.nonzero()
        torch.bincount(mask.long(), minlength=2)
        x.detach().cpu()
        torch.zeros(3).to(CUDA)
    return describe(watch)


def is_measured(system: str, task: str) -> bool:
    """Return whether the table has a step of a system for a task."""
    if system == "specialist-roberta-ast":
        # It differs in the encoders of text, code and sound.
        return task in ("text_classification", "speech_recognition", "masked_code")
    # Systems differ in their layers, so a task of each objective is enough for baselines; that
    # of videos has the fifth encoder of a specialist.
    is_video = (system, task) == ("specialist", "text_to_video")
    return system == "skillnet" or task in IN_PARTS or is_video


def iter_cases(corpora: Path) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the name of each case, and a function that measures it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    pretraining = replace(small_pretraining(corpora), views=True, contrastive=True)
    configs = {"finetune": small_config(corpora), "pretrain": build_joint_run(pretraining)}
    for each in configs.values():
        # A second layer would do the same, and double the time.
        each.model = replace(each.model, num_layers=1)
    for kind, config in configs.items():
        batches = first_batches(config)
        if kind == "pretrain":
            batches = {n: b for n, b in batches.items() if n not in configs["finetune"].tasks}
        parts = StepOptions(micro_batch_size=4, checkpointing=True)
        for system in SYSTEMS:
            census = StepCensus(config, system, mode)
            for task, batch in batches.items():
                if not is_measured(system, task):
                    continue
                name = f"{system} {task}"
                yield name, lambda c=census, b=batch: c.measure(b, StepOptions())
                if kind == "finetune" or task == "masked_text":
                    yield f"{name} inference", lambda c=census, b=batch: c.infer(b.task, b)
            # Checkpointing cannot be turned off again, so it comes last.
            for task, batch in batches.items():
                if is_measured(system, task) and task in IN_PARTS:
                    name = f"{system} {task} in checkpointed parts"
                    yield name, lambda c=census, b=batch, p=parts: c.measure(b, p)
        census = StepCensus(config, "skillnet", mode)
        for task, batch in first_batches(config, for_gpu=True).items():
            if task in WITH_PIXELS and task in batches:
                name = f"skillnet {task} from stored pixels"
                yield name, lambda c=census, b=batch: c.measure(b, StepOptions())
    config, batches = configs["finetune"], first_batches(configs["finetune"])
    census = StepCensus(config, "skillnet", mode)
    batch = batches["text_to_image"]
    yield "skillnet text_to_image fp32", lambda: census.measure(batch, StepOptions("fp32"))
    shared = replace(batch, global_rows=WORLD * len(batch.rows))
    for system in ("skillnet", "moe"):
        one = StepCensus(config, system, mode)
        name = f"{system} text_to_image on {WORLD} ranks"
        yield name, lambda c=one: c.measure(shared, StepOptions(world=WORLD))

    def train_offloaded(skills: int) -> dict[str, Any]:
        one = replace(batches["text_classification"], global_rows=WORLD)
        watch, sizes = measure_offloaded_steps(config, one, skills, WORLD, mode)
        return describe(watch) | sizes

    for skills in OFFLOADED_SKILLS:
        yield f"offloaded with {skills} skills", lambda n=skills: train_offloaded(n)

    def train_grown() -> dict[str, Any]:
        census.grow("text_classification")
        return census.measure(replace(batches["text_classification"], task="grown"), StepOptions())

    yield "skillnet grown", train_grown

    def step_of_make_gpu() -> dict[str, Any]:
        training = replace(config.training, precision="bf16")
        model = StepCensus(config, "skillnet", mode).model
        with mode:
            runner = StepRunner(replace(config, training=training), CUDA, model)
            step = runner.make_step("text_classification", 8, None)
            for _ in range(2):
                # The first step makes the state of the optimizer.
                with DeviceWatch() as watch:
                    step()
        return describe(watch)

    yield "make gpu text_classification", step_of_make_gpu


def iter_base_cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yield the cases at the size of configs/base.yaml; see :func:`iter_cases`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    config = FinetuneConfig(model=SkillNetConfig(**BASE, **ONE_TOKEN, bigram_buckets=8))
    census = StepCensus(config, "skillnet", mode)
    for task in AT_BASE_SIZE:

        def measure(task: str = task) -> dict[str, Any]:
            with mode:
                # Stochastic depth needs enough rows to drop some.
                batch = build_example_batch(config, task, 16, 16)
            return census.measure(batch, StepOptions())

        yield f"skillnet {task} at base size", measure


def main(corpora: Path, out: Path, only: str = "") -> None:
    """Measure all cases, or those whose name contains a text, and write them as JSON."""
    answer_values()
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    found = {WAITING_ON_PURPOSE: wait_on_purpose()}
    for name, measure in itertools.chain(iter_base_cases(), iter_cases(corpora)):
        if only not in name:
            continue
        try:
            found[name] = measure()
        except Exception as error:  # a case that fails must not hide the others
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:])
