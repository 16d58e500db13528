"""Checkpoints of sharded training, written while it continues.

torch.distributed.checkpoint copies each rank's parts to the host; then all ranks write them beside
the next steps, and the first rank joins them to the files of any other checkpoint::

    rank 0   copy | write parts | join, hash, rename
    rank 1   copy | write parts |
             step k  step k+1 …

The training loop calls :class:`ShardedCheckpoints`. The ranks must see one disk
(:func:`open_writer`); otherwise the first rank gathers and writes
(:func:`pipelines.training.loop.checkpointing.write_checkpoint`).
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.storage import WriteResult

from pipelines.training.config.run import TrainingConfig
from pipelines.training.loop.checkpointing import (
    CheckpointTensors,
    complete_checkpoint,
    remove_old_checkpoints,
)
from pipelines.training.loop.reporter import LoopReporter
from pipelines.training.runs.checkpoints import PREFIX
from skillnet.serialization import save_tensors, write_config
from skillnet_platform import storage
from skillnet_platform.errors import UserError

#: Seconds until files of other nodes must be visible.
VISIBLE_TIMEOUT_S = 120.0


class ShardedCheckpoints:
    """Writer of a run's checkpoints beside its training; at most one is being written.

    Args:
        folder: directory of the checkpoints, on a disk that all ranks see.
        tensors: weights and state; this rank has a part of each.
        rank: index of this process among the workers, from 0.
        keep: number of checkpoints that stay.
        on_written: called on the first rank, in another thread, with each complete checkpoint and
            its step.
    """

    def __init__(
        self,
        folder: Path,
        tensors: CheckpointTensors,
        rank: int,
        keep: int,
        on_written: Callable[[Path, int], None],
    ) -> None:
        self._folder, self._tensors = folder, tensors
        self._rank, self._keep, self._on_written = rank, keep, on_written
        # Weights and averages have the same names, so they are written separately. Their exchanges
        # must not mix with each other, nor with those of the training.
        self._groups = [_new_group() for _ in range(2)]
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: list[Any] = []
        self._completing: Future[Path] | None = None

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Copy the tensors of a step, and begin to write them; all ranks call this.

        Args:
            step: steps done.
            state: further keys of ``state.json``.

        Raises:
            UserError: the disk is full, now or for the checkpoint before.
        """
        self.finish()
        tensors = self._tensors
        final = self._folder / f"{PREFIX}{step:08d}"
        stack = contextlib.ExitStack()
        place = [""]
        if self._rank == 0:
            needed = 2 * tensors.count_bytes()  # the parts, and the files that they are joined to
            storage.require_space(final, needed)
            stack.enter_context(storage.disk_guard(final, needed))
            place = [str(stack.enter_context(storage.staging_directory(final)))]
        dist.broadcast_object_list(place, src=0, group=self._groups[0])
        staging, files = Path(place[0]), []
        for group, (kind, parts) in zip(self._groups, tensors.read_parts().items(), strict=False):
            files.append((staging / kind, list(parts)))
            self._writing.append(_write_parts(staging / kind, parts, group))
        if self._rank == 0:
            steps = {
                file: {name: value.cpu().clone() for name, value in values.items()}
                for file, values in tensors.read_steps().items()
            }
            state = tensors.complete_state(step, state)
            self._completing = self._thread.submit(
                self._complete, stack, staging, final, files, steps, state
            )

    def _complete(
        self,
        stack: contextlib.ExitStack,
        staging: Path,
        final: Path,
        files: list[tuple[Path, list[str]]],
        steps: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
    ) -> Path:
        with stack:
            for writing in self._writing:
                writing.result()
            written = [write_config(self._tensors.model, staging)]
            for folder, names in files:
                for number, name in enumerate(names, 1):
                    (joined,) = folder.glob(f"model-{number:05d}-of-*.safetensors")
                    # Step counts have no parts, so they are added to the joined tensors.
                    whole = load_file(joined) | steps.get(name, {})
                    save_tensors(whole, staging / f"{name}.safetensors")
                    written.append(f"{name}.safetensors")
                shutil.rmtree(folder)
            complete_checkpoint(staging, written, state)
        remove_old_checkpoints(self._folder, self._keep)
        self._on_written(final, state["step"])
        return final

    def finish(self) -> Path | None:
        """Wait until the last checkpoint is complete; all ranks call this.

        Returns:
            Its folder on the first rank; None elsewhere, and without one.
        """
        done, self._completing = self._completing, None
        path = done.result() if done is not None else None
        for writing in self._writing:
            writing.result()
        self._writing = []
        return path

    def close(self) -> Path | None:
        """Finish the last checkpoint, and free the threads; see :meth:`finish`."""
        with self._thread:
            return self.finish()


class PartsWriter(HuggingFaceStorageWriter):
    """Writer of safetensors that joins the parts only when it sees those of all ranks."""

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Join the parts; the first rank calls this after all ranks wrote theirs.

        Args:
            metadata: DCP's shapes and places of the tensors.
            results: outcomes of the writes of each rank.
        """
        written = {str(each.storage_data.relative_path) for rank in results for each in rank}
        wait_for_files(Path(self.path), written)
        super().finish(metadata, results)


def wait_for_files(folder: Path, names: set[str], timeout_s: float = VISIBLE_TIMEOUT_S) -> None:
    """Wait until a network file system shows files that other nodes wrote.

    Args:
        folder: directory of the files.
        names: file names, relative to the folder.
        timeout_s: seconds to wait.

    Raises:
        UserError: a file is missing.
    """
    end = time.monotonic() + timeout_s
    while missing := names - {path.name for path in folder.iterdir()}:
        if time.monotonic() > end:
            raise UserError(
                f"{folder}: {min(missing)}, which another worker wrote, does not appear. Give "
                "--run_dir a folder that all workers see"
            )
        time.sleep(0.1)


def _new_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _write_parts(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], group: Any) -> Any:
    """Begin to write this rank's parts of some files; return the future."""
    numbers = {key: number for number, keys in enumerate(parts.values(), 1) for key in keys}
    flat: dict[str, Any] = {key: x for tensors in parts.values() for key, x in tensors.items()}
    writer = PartsWriter(
        str(folder),
        fqn_to_index_mapping=numbers,
        save_distributed=True,
        enable_consolidation=True,
    )
    return async_save(flat, storage_writer=writer, process_group=group)


def open_writer(
    folder: Path,
    tensors: CheckpointTensors,
    rank: int,
    settings: TrainingConfig,
    reporter: LoopReporter,
) -> ShardedCheckpoints | None:
    """Return a writer, or None if the ranks see different disks; all ranks call this.

    Args:
        folder: directory of the checkpoints; is created on the first rank.
        tensors: weights and state; this rank has a part of each.
        rank: index of this process among the workers, from 0.
        settings: hyperparameters of the training.
        reporter: receiver of progress of the first rank; receives complete checkpoints.
    """
    assert tensors.shards is not None
    with _probe_file(folder, rank) as name:
        names = [name]
        dist.broadcast_object_list(names, src=0)
        sees = torch.tensor([float((folder / names[0]).is_file())], device=tensors.shards.device)
        dist.all_reduce(sees, dist.ReduceOp.MIN)
    if not sees.item():
        return None
    keep, on_written = settings.keep_checkpoints, reporter.checkpoint
    return ShardedCheckpoints(folder, tensors, rank, keep, on_written)


@contextlib.contextmanager
def _probe_file(folder: Path, rank: int) -> Iterator[str]:
    if rank:
        yield ""
        return
    with storage.scratch_directory(folder / "probe") as scratch:
        (scratch / "file").touch()
        yield str((scratch / "file").relative_to(folder))
