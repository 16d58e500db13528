"""Compilation of a run before its first step, so that no rank waits for another one later."""

import torch

from pipelines.training.config.run import FinetuneConfig
from skillnet.encoder import place_rows
from skillnet.layer_compiler import LayerCompiler
from skillnet.modality import find_modality, find_stem
from skillnet.model import SkillNet
from skillnet.multitask_model import TaskModel
from skillnet.objectives.base import find_objective
from skillnet.precision import ComputePrecision
from skillnet.skills import SkillPlan
from skillnet.skipped_init import SkippedInit
from skillnet_platform import console

#: Rows of a trial: with one row, the number of rows is a constant of the graph.
TRIAL_ROWS = 2


def compile_layers(
    config: FinetuneConfig,
    trained: TaskModel,
    evaluated: TaskModel,
    precision: ComputePrecision,
    rank: int = 0,
    world: int = 1,
    backend: str = "inductor",
) -> None:
    """Compile the layers of a run for all plans of its tasks.

    What cannot be compiled is computed without, and the first rank says why.

    Args:
        config: settings with their tasks and sizes resolved.
        trained: computes steps; its ``requires_grad`` flags are set.
        evaluated: computes validations; the same model, or with shards another one.
        precision: device and number types.
        rank: index of this process among the ranks of a batch, from 0.
        world: number of ranks of a batch.
        backend: compiler that ``torch.compile`` uses, such as ``inductor``.
    """

    def report(line: str) -> None:
        if rank == 0:
            console.print_warning(f"training.compile: {line}")

    if not isinstance(trained, SkillNet) or not trained.encoder.can_compile:
        report(f"the system {trained.system} runs without compilation")
        return
    assert isinstance(evaluated, SkillNet)
    compiler = LayerCompiler(
        lambda cause: report(f"layers run without compilation ({cause})"), backend
    )
    trained.encoder.compile_layers(compiler)
    evaluated.encoder.compile_layers(compiler)
    settings = config.training
    for name, task in config.trained.items():
        total = task.batch_size
        most = min(total // world, settings.micro_batch_size or total)
        rows = min(max(most, 1), TRIAL_ROWS)
        spec = config.model.tasks[name]
        # Batches in parts pass forward without gradients first.
        is_cached = settings.micro_batch_size and find_objective(spec.objective).pairs_towers
        for plan in spec.towers.values():
            with place_rows(0, total, 0):
                _prepare_pass(trained, plan, precision, rows, is_training=True)
                if is_cached:
                    with torch.no_grad():
                        _prepare_pass(trained, plan, precision, rows, is_training=True)
            if settings.evaluate_every:
                with torch.no_grad():
                    _prepare_pass(evaluated, plan, precision, TRIAL_ROWS, is_training=False)


def _prepare_pass(
    model: SkillNet, plan: SkillPlan, precision: ComputePrecision, rows: int, is_training: bool
) -> None:
    encoder, device = model.encoder, precision.device
    half = find_modality(plan.modality).tensor_half
    batch = half.make_example(model.config, rows)
    # The weights of the run's own stem may be shards, or in the host's memory.
    with SkippedInit(), device:
        stem = find_stem(plan.stem)(model.config).to(precision.weights)
    has_gradient = any(p.requires_grad for p in model.stems[plan.stem].parameters())
    was_training = encoder.training
    encoder.train(is_training)
    with precision.autocast():
        with torch.no_grad():
            placed = {name: x.to(device) for name, x in batch.items()}
            x_BTD, mask_BT = stem(placed, plan.modality)
        x_BTD.requires_grad_(has_gradient and torch.is_grad_enabled())
        encoder.prepare(x_BTD, plan.skills, mask_BT)
    encoder.train(was_training)
