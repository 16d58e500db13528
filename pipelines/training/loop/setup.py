"""Inputs of a run before its first step: corpora, batches, model, device and newest checkpoint."""

import os
import platform
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from pipelines.data.shards.dataset import PreparedCorpus
from pipelines.training.config.data import AUGMENTATIONS, MASKS
from pipelines.training.config.resources import request_workers
from pipelines.training.config.run import FinetuneConfig, TrainingConfig
from pipelines.training.loading.dataloader import MultiTaskDataLoader
from pipelines.training.loop.gradient_sync import BUCKET_BYTES, GradientSync, broadcast_parameters
from pipelines.training.loop.init_from import (
    InitReport,
    find_untouched_files,
    load_init_weights,
)
from pipelines.training.loop.placed_state import PlacedState
from pipelines.training.loop.residency import SharedMemory
from pipelines.training.loop.task_groups import TaskGroups
from pipelines.training.runs import checkpoints
from pipelines.training.runs.identity import open_corpora
from pipelines.training.runs.vocabulary_match import read_corpora_vocabulary
from skillnet.multitask_model import TaskModel
from skillnet.precision import ComputePrecision
from skillnet.serialization import read_manifest, read_vocabulary
from skillnet.skipped_init import SkippedInit, leave_out, placed_weights
from skillnet.systems import build_system, find_system
from skillnet_platform.cluster.capacity import require_gpus
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage.cache import GB, LIMIT_VARIABLE, shared_cache

if TYPE_CHECKING:
    from pipelines.training.loop.sharding import ModelShards, ShardedModel, ShardedSync


def build_dataloader(
    config: FinetuneConfig, corpora: Mapping[str, PreparedCorpus]
) -> MultiTaskDataLoader:
    """Build the batches of all trained tasks.

    Args:
        config: settings of the run.
        corpora: corpus name -> opened corpus, see
            :func:`pipelines.training.runs.identity.open_corpora`.

    Raises:
        UserError: a corpus does not fit its task, or the shards in use exceed the cache.
    """
    training = config.training
    dataloader = MultiTaskDataLoader(
        corpora,
        config.trained,
        config.model,
        config.seed,
        AUGMENTATIONS[training.augment],
        training.temperature,
        MASKS[training.masking],
        training.shuffle_gb * GB,
        training.shard_groups,
        training.tasks_per_step,
    )
    needed, limit = dataloader.bytes_in_use(), shared_cache().limit
    if needed > limit:
        raise UserError(
            f"{LIMIT_VARIABLE}: the shards that training uses at once need up to "
            f"{needed / GB:.2g} GB, and the cache holds {limit / GB:.2g} GB; set it to "
            f"{needed / GB:.2g} or more, or lower training.shuffle_gb ({training.shuffle_gb})"
        )
    return dataloader


def build_model(
    config: FinetuneConfig, corpora: Mapping[str, PreparedCorpus] | None = None
) -> TaskModel:
    """Build the model of a configuration: random weights from the seed, or those of init_from.

    Args:
        config: settings of the run.
        corpora: corpus name -> opened corpus; None opens them. They have the model's vocabulary.

    Raises:
        UserError: a corpus is missing, or the weights of ``init_from`` do not fit.
    """
    return _build_started(config, open_corpora(config) if corpora is None else corpora)[0]


def build_structure(
    config: FinetuneConfig, corpora: Mapping[str, PreparedCorpus], dtype: torch.dtype
) -> TaskModel:
    """Build the model of a configuration without values, on the meta device.

    Args:
        config: settings of the run.
        corpora: corpus name -> opened corpus. They have the model's vocabulary.
        dtype: number type of the weights.
    """
    with torch.device("meta"), SkippedInit():
        model = build_system(config.system, config.model, config.options)
    of_task = {name: corpora[task.corpus] for name, task in config.tasks.items()}
    model.vocabulary = read_corpora_vocabulary(config.model.tasks, of_task)
    return model.to(dtype)


def dry_run_init(
    config: FinetuneConfig, corpora: Mapping[str, PreparedCorpus] | None = None
) -> InitReport | None:
    """Load the initial weights into a model that is discarded; return the report.

    Args:
        config: settings of the run.
        corpora: corpus name -> opened corpus; None opens them.

    Raises:
        UserError: as for :func:`build_model`.
    """
    if not config.init_from:
        return None
    return _build_started(config, open_corpora(config) if corpora is None else corpora)[1]


def _build_started(
    config: FinetuneConfig, corpora: Mapping[str, PreparedCorpus], shared: Path | None = None
) -> tuple[TaskModel, InitReport | None]:
    """Build the model of a run with its initial weights.

    Args:
        config: settings of the run.
        corpora: corpus name -> opened corpus.
        shared: folder for the random weights of skills that no task uses, see
            :class:`~pipelines.training.loop.residency.SharedMemory`; None keeps them in memory.
    """
    unused = find_unused_files(config)
    untouched = find_untouched_files(config, unused)
    skills = {file.removeprefix("skill-") for file in untouched}
    drawn = {file.removeprefix("skill-") for file in unused} - skills if shared else set()
    memory = SharedMemory(shared) if shared and drawn else None
    # The seed alone determines random weights, on every rank and in every process.
    torch.manual_seed(config.seed)
    with placed_weights(skills, leave_out), placed_weights(drawn, memory or leave_out):
        model = build_system(config.system, config.model, config.options)
    of_task = {name: corpora[task.corpus] for name, task in config.tasks.items()}
    model.vocabulary = read_corpora_vocabulary(config.model.tasks, of_task)
    return model, load_init_weights(config, model, of_task, untouched)


def find_used_files(config: FinetuneConfig) -> set[str] | None:
    """Return the files that the tasks of a run use, without suffix; None means all of them.

    Args:
        config: settings of the run.
    """
    # A part of every weight lies on each rank that shares them.
    if config.training.sharding in ("full", "hybrid"):
        return None
    return _find_needed_files(config)


def _find_needed_files(config: FinetuneConfig) -> set[str] | None:
    """Return the files of the tasks of a run; None if its system may have parts in no file."""
    # A baseline has other skills than the study's SkillNet.
    system = find_system(config.system)
    return system.model.needed_files(system.find_shape(config.model, config.options), config.tasks)


def find_unused_files(config: FinetuneConfig) -> set[str]:
    """Return the files of the skills that no task of a run uses, without suffix.

    Args:
        config: settings of the run.
    """
    used = find_used_files(config)
    if used is None:
        return set()
    skills = find_system(config.system).find_shape(config.model, config.options).skills
    return {f"skill-{name}" for name in skills} - used


def find_checkpoint(
    run: Path, identity: str, world: int, used: Collection[str] | None
) -> checkpoints.VerifiedCheckpoint | None:
    """Return the newest valid checkpoint that a run resumes from; None without one.

    All ranks can read it, each from its own disk.

    Args:
        run: folder of the run.
        identity: digest that the checkpoint must carry.
        world: number of ranks, which all call this.
        used: files that are hashed; see :func:`find_used_files`.

    Raises:
        UserError: the checkpoint belongs to another configuration, or only some ranks see one.
    """
    folder, rank, nodes = run / "checkpoints", 0, [""] * world
    if world > 1:
        rank = dist.get_rank()
        dist.all_gather_object(nodes, platform.node())
    # The first rank of a node hashes the files for all of them.
    readers = [nodes.index(node) for node in nodes]
    newest = checkpoints.find_newest(folder, used, readers[rank] == rank)
    # Each rank may see its own disk. Repeat until all agree on one step.
    while world > 1:
        steps: list[Any] = [None] * world
        dist.all_gather_object(steps, newest.step if newest else None)
        if len(set(steps)) == 1:
            break
        if all(steps[reader] is None for reader in readers):
            newest = None
            break
        if None in steps:
            seen = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(steps))
            raise UserError(
                f"{folder}: the workers see different checkpoints ({seen}). They run on nodes "
                "without a shared disk: give --run_dir a folder that all of them see, or a URI "
                "such as s3://bucket/runs. Checkpoints on one node were not uploaded in time; "
                "start on that node to resume from them"
            )
        least = min(steps)
        if newest is not None and newest.step > least:
            # Training writes the later checkpoints again, with the same bits. A checkpoint that
            # stayed beside newer ones would be taken for an old one and be deleted.
            for name in [p.name for p in folder.glob("*") if checkpoints.step_of(p.name) > least]:
                shutil.rmtree(folder / name, ignore_errors=True)
            newest = checkpoints.find_newest(folder, used, readers[rank] == rank)
    if newest is not None and newest.state.get("config_digest") != identity:
        raise UserError(
            f"{newest.path} was written with another configuration; resume with that one "
            f"({run / 'config.yaml'}), or give this run another name"
        )
    return newest


def pick_device(use_gpu: bool) -> torch.device:
    """Return the device of this worker.

    Raises:
        UserError: a GPU is requested and torch finds none.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            f"training.use_gpu is true, but torch {torch.__version__} finds no GPU on "
            f"{platform.node()}, where this worker runs. Install the driver and a build of torch "
            "for its GPU, or train without GPUs (--training.use_gpu false)"
        )
    return torch.device("cuda", torch.cuda.current_device())


def require_devices(training: TrainingConfig) -> None:
    """Check in the driver that the workers of a run get their devices.

    The driver itself needs no GPU, and touches none: Ray gives the GPUs to the workers.

    Raises:
        UserError: the cluster has too few GPUs.
    """
    if not training.use_gpu:
        return
    # Counting does not initialise a device.
    require_gpus(request_workers(training), torch.cuda.device_count())


def count_threads(cpus: float, local_workers: int) -> int:
    """Return the number of threads of a worker on its node, at least one.

    Args:
        cpus: CPUs that the worker reserved in Ray.
        local_workers: workers of the run on this node.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # One CPU stands for a slot: the workers of a run share the node. More of them were reserved
    # beside other programs on the node, so the worker uses these.
    mine = int(cpus) if cpus > 1 else (cores or 1) // local_workers
    return max(1, min(mine, cores or 1))


NamedParameters = list[tuple[str, nn.Parameter]]


def trainable_parameters(model: TaskModel, config: FinetuneConfig) -> dict[str, NamedParameters]:
    """Freeze the files outside ``training.trainable``; return the trainable parameters by task.

    Args:
        model: its ``requires_grad`` flags are set.
        config: settings of the run.

    Returns:
        Task -> names and tensors that its steps change.

    Raises:
        UserError: the model has no such file, or a task has no weight to train.
    """
    trainable = set(config.training.trainable)
    files = model.files_of()
    for file in sorted(trainable - files.keys()):
        suggestion = suggest_name(file, files)
        raise UserError(f"training.trainable: the model has no file {file!r}{suggestion}")
    parameters = dict(model.named_parameters())
    for file, names in files.items():
        for name in names:
            parameters[name].requires_grad_(not trainable or file in trainable)
    position = {name: number for number, name in enumerate(parameters)}
    active = {}
    for task in config.trained:
        # A task looks at its own files alone: with many skills, most belong to other tasks.
        required = model.required_files(task)
        used = [
            name
            for file in required & files.keys()
            if not trainable or file in trainable
            for name in files[file]
            if model.uses_parameter(name, task)
        ]
        if not used:
            activated = ", ".join(sorted(required))
            raise UserError(
                f"training.trainable leaves nothing to train for {task}, which activates "
                f"{activated}"
            )
        active[task] = [(name, parameters[name]) for name in sorted(used, key=position.__getitem__)]
    return active


@dataclass
class TrainingReplica:
    """Weights of a run on one rank.

    Args:
        model: is evaluated and saved. With shards it holds only weights that were gathered for it.
        runner: computes steps.
        active: task -> weights that its steps change, as the optimizer sees them.
        sync: sums gradients over ranks.
        groups: ranks that compute different tasks.
        placed: weights that some of these groups do not hold.
        held: names of the weights that this rank updates.
        shards: this rank's part of the weights; None if it holds them whole.
        source: folder of the initial weights; None if all are random.
    """

    model: TaskModel
    runner: "TaskModel | ShardedModel"
    active: dict[str, NamedParameters]
    sync: "GradientSync | ShardedSync"
    groups: TaskGroups
    placed: PlacedState
    held: set[str]
    shards: "ModelShards | None" = None
    source: Path | None = None

    def list_active(self, tasks: Collection[str]) -> NamedParameters:
        """Return the weights that this rank updates in a step of some tasks."""
        if len(tasks) == 1:
            return self.active[next(iter(tasks))]
        named = {name: p for task in sorted(tasks) for name, p in self.active[task]}
        return [(name, p) for name, p in named.items() if name in self.held]

    @property
    def owner(self) -> "TaskModel | ModelShards":
        """Holder of the weights that the optimizer updates."""
        return self.model if self.shards is None else self.shards

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """Ranks that each have a part of every weight; None if each has the whole."""
        return None if self.shards is None else self.shards.group


def build_replica(
    config: FinetuneConfig,
    corpora: Mapping[str, PreparedCorpus],
    rank: int,
    world: int,
    precision: ComputePrecision,
    folder: Path | None = None,
    checkpoint: checkpoints.VerifiedCheckpoint | None = None,
    given: TaskModel | None = None,
    groups: TaskGroups | None = None,
) -> TrainingReplica:
    """Build the weights of a run, equal on all ranks, as ``training.sharding`` says.

    Args:
        config: settings with their tasks and sizes resolved.
        corpora: corpus name -> opened corpus.
        rank: index of this process among the workers, from 0.
        world: number of processes. One holds all weights.
        precision: device of the forward pass, and number types of weights and products.
        folder: directory of the run; None keeps all weights in memory.
        checkpoint: from which the caller loads all weights; None gives initial ones.
        given: model of one process that is trained in place; None builds one.
        groups: ranks that compute different tasks; None if all compute the same.

    Raises:
        UserError: corpora or initial weights do not fit, or the system cannot be sharded.
    """
    settings, device = config.training, precision.device
    groups = groups or TaskGroups([config.trained], rank, world)
    if settings.sharding in ("full", "hybrid") and world > 1:
        return _build_shards(config, corpora, groups, rank, world, precision, checkpoint)
    # Weights that are not in use stay in the host's memory.
    place = torch.device("cpu") if settings.sharding == "host" else device
    report = None
    if given is not None:
        model = given
        of_task = {name: corpora[task.corpus] for name, task in config.tasks.items()}
        model.vocabulary = read_corpora_vocabulary(config.model.tasks, of_task)
    elif checkpoint is not None and _find_needed_files(config) is not None:
        model = _build_resumed(config, checkpoint)
    else:
        # Each rank builds the model from the seed or the initial weights.
        shared = None if folder is None else folder / f".shared-{platform.node()}"
        model, report = _build_started(config, corpora, shared)
    resting = find_unused_files(config)
    model.place_weights(place, precision.weights, resting)
    model.limit_kept_tokens(settings.kept_tokens)
    # The broadcast makes weights bitwise equal even if nodes compute initial weights differently.
    if world > 1 and checkpoint is None:
        files = model.files_of()
        resting_names = {name for file in resting & files.keys() for name in files[file]}
        used = [p for name, p in model.named_parameters() if name not in resting_names]
        broadcast_parameters(used, BUCKET_BYTES, device)
    if checkpoint is None and folder is not None:
        # All workers of the node have mapped its files, which go with the last of them.
        if world > 1:
            dist.barrier()
        shutil.rmtree(folder / f".shared-{platform.node()}", ignore_errors=True)
    active = trainable_parameters(model, config)
    sync = GradientSync(active, world, groups=groups)
    source = None if report is None else Path(report.source)
    held = groups.find_held(active)
    placed = PlacedState(groups, active)
    return TrainingReplica(model, model, active, sync, groups, placed, held, source=source)


def _build_resumed(config: FinetuneConfig, checkpoint: checkpoints.VerifiedCheckpoint) -> TaskModel:
    """Build the model of a checkpoint, from which all weights are loaded next."""
    unused = {file.removeprefix("skill-") for file in checkpoint.unread}
    with SkippedInit(), placed_weights(unused, leave_out):
        model = build_system(config.system, config.model, config.options)
    model.vocabulary = read_vocabulary(checkpoint.path, read_manifest(checkpoint.path))
    return model


def count_sharing_workers(sharding: str, workers: int, workers_per_node: int) -> int:
    """Return the number of workers that divide one replica of the weights among themselves.

    A worker holds this fraction of all weights, optimizer states and averages. During a step it
    also holds the weights and gradients of the step's task as a whole.

    Args:
        sharding: ``training.sharding``.
        workers: number of training processes of the run.
        workers_per_node: workers on each node.
    """
    shares = {"none": 1, "host": 1, "hybrid": workers_per_node, "full": workers}
    return max(1, min(shares[sharding], workers))


def _build_shards(
    config: FinetuneConfig,
    corpora: Mapping[str, PreparedCorpus],
    groups: TaskGroups,
    rank: int,
    world: int,
    precision: ComputePrecision,
    checkpoint: checkpoints.VerifiedCheckpoint | None,
) -> TrainingReplica:
    # Other runs start faster without these libraries.
    from pipelines.training.loop.sharding import (
        ShardedSync,
        build_mesh,
        require_sharding,
        shard_model,
    )

    settings = config.training
    structure, whole = (build_structure(config, corpora, precision.weights) for _ in range(2))
    require_sharding(structure)
    structure.limit_kept_tokens(settings.kept_tokens)
    active = trainable_parameters(structure, config)
    # The first rank alone holds the whole model, on the host, until it has sent all parts.
    if rank:
        source = None
    elif checkpoint is not None and _find_needed_files(config) is not None:
        source = _build_resumed(config, checkpoint)
    else:
        source = build_model(config, corpora)
    shards = shard_model(
        structure,
        whole,
        source,
        build_mesh(precision.device, world, settings.sharding == "hybrid"),
        products=precision.products,
        frees_early=settings.kept_tokens is not None,
    )
    whole.weight_loader = shards.load_task
    own = {task: [(n, shards.parameters[n]) for n, _ in named] for task, named in active.items()}
    held = groups.find_held(own)
    sync, placed = ShardedSync(shards, own), PlacedState(groups, own)
    return TrainingReplica(whole, shards.runner, own, sync, groups, placed, held, shards)
