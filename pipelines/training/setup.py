"""What a run needs before its first step: corpora, stream, model, device, and where to go on."""

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.config.run import FinetuneConfig
from pipelines.loading.dataloader import MultiTaskDataLoader
from pipelines.runs import checkpoints
from pipelines.shards.dataset import PreparedCorpus, open_corpus
from pipelines.training import checkpointing
from pipelines.training.init_from import start_model
from pipelines.training.optimizer import WeightAverage
from skillnet.multitask_model import TaskModel
from skillnet.systems import build_system
from skillnet_platform import storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage.cache import GB, shared_cache
from skillnet_platform.storage.location import below, place


def open_stream(config: FinetuneConfig) -> MultiTaskDataLoader:
    """The mixed stream over the corpora that the tasks name.

    Raises:
        UserError: a corpus that is missing or does not fit its task.
    """
    corpora = open_corpora(config)
    stream = MultiTaskDataLoader(
        corpora,
        config.trained,
        config.model,
        config.seed,
        config.training.augment,
        config.training.temperature,
        config.training.masking,
        config.training.shuffle_gb * GB,
    )
    needed, limit = stream.bytes_in_use(), shared_cache(config.storage.cache_gb).limit
    if needed > limit:
        raise UserError(
            f"storage.cache_gb: the shards that training uses at once may take "
            f"{needed / GB:.2g} GB, and the cache holds {limit / GB:.2g} GB; set it to "
            f"{needed / GB:.2g} or more, or training.shuffle_gb "
            f"({config.training.shuffle_gb}) lower"
        )
    return stream


def open_corpora(config: FinetuneConfig) -> dict[str, PreparedCorpus]:
    """Corpus name -> opened corpus, of all tasks; their vocabularies must fit the model's."""
    data = place(config.data, storage.data_root())
    cache = shared_cache(config.storage.cache_gb)
    corpora = {
        name: open_corpus(below(data, name), cache=cache)
        for name in sorted({settings.corpus for settings in config.tasks.values()})
    }
    for name, corpus in corpora.items():
        size = (corpus.manifest.get("tokenizer") or {}).get("vocab_size", 0)
        if size > config.model.vocab_size:
            raise UserError(
                f"corpus {name} was prepared with a vocabulary of {size} tokens, "
                f"model.vocab_size is {config.model.vocab_size}; set it to {size} or more"
            )
    return corpora


def build_model(config: FinetuneConfig) -> TaskModel:
    """A model of the configuration's shape: random, keyed by the seed, or from ``init_from``."""
    torch.manual_seed(config.seed)
    model = build_system(config.system, config.model, config.options)
    start_model(config, model)
    return model


def resume(
    run: Path,
    identity: str,
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None,
    world: int = 1,
) -> int:
    """Take up the newest whole checkpoint of a run; the number of steps that it had done.

    Raises:
        UserError: the checkpoint is of a run with another configuration, or not all of ``world``
            ranks see one.
    """
    found = agreed(run / "checkpoints", world)
    if found is None:
        return 0
    if found.state.get("config_digest") != identity:
        raise UserError(
            f"{found.path} was written with another configuration than this one; go on with that "
            f"one ({run / 'config.yaml'}), or give this run another name"
        )
    checkpointing.load(found, model, optimizer, average)
    return found.step


def agreed(folder: Path, world: int) -> checkpoints.Checkpoint | None:
    """The newest whole checkpoint that all ranks can read; of each rank's own, on its own disk.

    Raises:
        UserError: some see checkpoints and others none.
    """
    found = checkpoints.newest(folder)
    while world > 1:
        steps: list[Any] = [None] * world
        dist.all_gather_object(steps, found.step if found else None)
        if len(set(steps)) == 1:
            break
        if None in steps:
            seen = ", ".join(f"rank {rank}: {step}" for rank, step in enumerate(steps))
            raise UserError(
                f"{folder}: the workers see different checkpoints ({seen}). They are on machines "
                "that share no disk: give --run_dir a folder that all of them see, or a URI such "
                "as s3://bucket/runs. What is on one machine only was not sent to it in time; "
                "start there to go on from it"
            )
        least = min(steps)
        if found is not None and found.step > least:
            # It will be made again, to the bit; beside newer ones it would be taken for old.
            for name in [p.name for p in folder.glob("*") if checkpoints.step_of(p.name) > least]:
                shutil.rmtree(folder / name, ignore_errors=True)
            found = checkpoints.newest(folder)
    return found


def pick_device(use_gpu: bool) -> torch.device:
    """The device of this worker.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if not use_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("training.use_gpu is true, but torch finds no GPU on this machine")
    return torch.device("cuda", torch.cuda.current_device())
