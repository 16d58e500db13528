"""Checkpoints: written atomically, and verified when read.

    step-00000500/
      config.json, shared.safetensors, skill-*.safetensors, …   the model, as save_pretrained
      optimizer-<file>.safetensors                              optimizer state, a file per skill
      average-<file>.safetensors                                averaged weights, if kept
      best-<file>.safetensors                                   weights of the best validation
      state.json                                                step, seed, configuration digest
      manifest.json                                             sizes and hashes; written last

There is no generator state: all randomness is keyed by (seed, step).
"""

import contextlib
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor

from pipelines.training.loop.optimizer import BestWeights, WeightAverage
from pipelines.training.runs.checkpoints import (
    PREFIX,
    VerifiedCheckpoint,
    list_checkpoint_folders,
    load_weights,
)
from skillnet.multitask_model import TaskModel
from skillnet.serialization import (
    SavedFile,
    TensorMarks,
    load_tensors,
    mark_tensors,
    read_manifest,
    save_tensors,
    write_config,
    write_manifest,
    write_parts,
)
from skillnet_files.commit import link_or_copy
from skillnet_platform import storage
from skillnet_platform.errors import UserError

if TYPE_CHECKING:
    from pipelines.training.loop.sharding import ModelShards

#: Tensors that AdamW keeps for each parameter.
OPTIMIZER_STATE = ("step", "exp_avg", "exp_avg_sq")


class UnchangedFiles:
    """Files of the newest checkpoint, and of the initial weights, whose tensors did not change.

    The next checkpoint gets them as hard links, so a checkpoint costs what changed: of a thousand
    skills, those that were trained. No program writes into a file of a saved model, so files may
    be in several folders. torch counts the changes of each tensor in place.

    Args:
        source: saved model with initial weights; None if all weights are random.
        unread: file, without suffix -> file that the model maps.
        only_unread: link no other files, because their tensors move between devices and do not
            count their changes.
    """

    def __init__(
        self,
        source: Path | None = None,
        unread: Mapping[str, SavedFile] = MappingProxyType({}),
        only_unread: bool = False,
    ) -> None:
        self._known = {f"{file}.safetensors": each for file, each in unread.items()}
        #: Names of the files that may be linked; None means all.
        self._linked = set(self._known) if only_unread else None
        #: Name and entry of the manifest -> path, of files that no checkpoint has yet.
        self._initial: dict[tuple[str, str], Path] = {}
        if source is not None and not only_unread:
            files = read_manifest(source)["files"]
            self._initial = {(n, about["sha256"]): source / n for n, about in files.items()}
        #: Size and hash of the files of the checkpoint in progress, as far as they are known.
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._marks: dict[str, TensorMarks] = {}

    def link(self, tensors: Mapping[str, Tensor], path: Path) -> bool:
        """Link the file of an earlier checkpoint that has the same tensors; return whether it can.

        Args:
            tensors: name -> tensor of the training, not a copy of it.
            path: location of the file.
        """
        if self._linked is not None and path.name not in self._linked:
            return False
        marks = self._marks[path.name] = mark_tensors(tensors)
        known = self._known.get(path.name)
        if known is None or known.marks != marks or not _link(known.path, path, known.entry):
            return False
        self.entries[path.name] = known.entry
        return True

    def write(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Write a file that :meth:`link` did not link.

        Args:
            tensors: name -> tensor of the training, or a copy of it.
            path: location of the file.
        """
        if path.name in self._known or not self._initial:
            _save_copies(tensors, path)
            return
        content = safetensors.torch.save(_to_cpu(tensors))
        digest = hashlib.sha256(content).hexdigest()
        entry = self.entries[path.name] = {"bytes": len(content), "sha256": digest}
        initial = self._initial.get((path.name, digest))
        if initial is None or not _link(initial, path, entry):
            path.write_bytes(content)

    def save(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Link or write a file of a checkpoint.

        Args:
            tensors: name -> tensor of the training, not a copy of it.
            path: location of the file.
        """
        if not self.link(tensors, path):
            self.write(tensors, path)

    def count_bytes(self, tensors: "CheckpointTensors") -> int:
        """Return the bytes of the files that the next checkpoint links.

        Args:
            tensors: weights and state of the training.
        """
        files = (*tensors.read_weights(), *tensors.read_state())
        found = ((self._known.get(f"{name}.safetensors"), values) for name, values in files)
        return sum(k.entry["bytes"] for k, v in found if k and k.marks == mark_tensors(v))

    def commit(self, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over a finished checkpoint; its files are those that later ones link.

        Args:
            folder: directory of the checkpoint.
            files: size and hash of each file.
        """
        self._known = {n: SavedFile(folder / n, files[n], m) for n, m in self._marks.items()}
        self._initial.clear()
        self.entries, self._marks = {}, {}

    def resume(self, folder: Path, tensors: "CheckpointTensors") -> None:
        """Take over the checkpoint that was just loaded.

        Args:
            folder: directory of the checkpoint.
            tensors: weights and state, as loaded.
        """
        files = read_manifest(folder)["files"]
        for file, values in (*tensors.read_weights(), *tensors.read_state()):
            if f"{file}.safetensors" in files:
                self._marks[f"{file}.safetensors"] = mark_tensors(values)
        self.commit(folder, files)


def _save_copies(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_tensors(_to_cpu(tensors), path)


def _link(source: Path, path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        if source.stat().st_size != entry["bytes"]:
            return False
        link_or_copy(source, path)
    except OSError:  # it went away, or the disk is full
        return False
    return True


class CheckpointTensors:
    """Tensors of a training by file, whole, also if each rank has a part of them.

    Args:
        model: names and files of the weights.
        optimizer: state and update of its weights, or of their shards.
        average: averaged weights, or None.
        shards: this rank's part of the weights; all ranks then read the same files in turn.
        best: weights of the best validation, or None.
    """

    def __init__(
        self,
        model: TaskModel,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        shards: "ModelShards | None" = None,
        best: BestWeights | None = None,
    ) -> None:
        self.model, self.shards = model, shards
        self._optimizer, self._average, self._best = optimizer, average, best
        self._owned = dict((shards or model).named_parameters())

    def _gather(self, name: str, tensor: Tensor) -> Tensor:
        return tensor if self.shards is None else self.shards.gather(name, tensor)

    def read_weight(self, name: str) -> Tensor:
        """Return a weight."""
        return self._gather(name, self._owned[name])

    def read_weights(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield name and tensors of each file of the weights."""
        for file, names in self.model.files_of().items():
            yield file, {name: self.read_weight(name) for name in names}

    def read_state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Yield name and tensors of each file of the optimizer state, averages and best weights.

        A tensor of the state is called ``<parameter>/<field>``. Parameters that no step has
        updated have no state.
        """
        return (each for each in self._list_state(self._gather) if each[1])

    def _list_state(
        self, take: Callable[[str, Tensor], Tensor], with_steps: bool = True
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        means = self._average.values if self._average is not None else {}
        best = self._best.values if self._best is not None else {}
        for file, names in self.model.files_of().items():
            yield (
                f"optimizer-{file}",
                {
                    f"{name}/{field}": value if field == "step" else take(name, value)
                    for name in names
                    if (parameter := self._owned[name]) in self._optimizer.state
                    for field in OPTIMIZER_STATE
                    if with_steps or field != "step"
                    for value in (self._optimizer.state[parameter][field],)
                },
            )
            taken = {name: take(name, means[name]) for name in names if name in means}
            yield f"average-{file}", taken
            yield f"best-{file}", {name: best[name] for name in names if name in best}

    def join(self) -> None:
        """Take part in gathering the tensors of a checkpoint that another rank writes."""
        for files in (self.read_weights(), self.read_state()):
            deque(files, maxlen=0)

    def read_parts(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """Return this rank's parts: of weights and optimizer state, and of averages, by file.

        The step counts of the optimizer are whole; see :meth:`read_steps`.
        """
        assert self.shards is not None
        share = self.shards.share
        parts: dict[str, dict[str, dict[str, Tensor]]] = {"current": {}, "averages": {}}
        for file, names in self.model.files_of().items():
            parts["current"][file] = {name: share(name, self._owned[name]) for name in names}
        for file, values in self._list_state(share, with_steps=False):
            if values:
                parts["averages" if file.startswith("average-") else "current"][file] = values
        return {kind: files for kind, files in parts.items() if files}

    def read_steps(self) -> dict[str, dict[str, Tensor]]:
        """Return the step counts of all weights that have one, by file."""
        state = self._optimizer.state
        return {
            f"optimizer-{file}": {
                f"{name}/step": state[self._owned[name]]["step"]
                for name in names
                if self._owned[name] in state
            }
            for file, names in self.model.files_of().items()
        }

    def complete_state(self, step: int, state: dict[str, Any]) -> dict[str, Any]:
        """Return the content of ``state.json``.

        Args:
            step: steps done.
            state: further keys.
        """
        further: dict[str, Any] = {}
        if self._average is not None:
            further["average_updates"] = dict(self._average.updates)
        if self._best is not None:
            further["best"] = self._best.to_dict()
        return {"step": step, **state, **further}

    def count_bytes(self) -> int:
        """Return the bytes of all files, about."""
        copies = 1 + (self._average is not None) + (self._best is not None)
        total = sum(copies * p.numel() * p.element_size() for p in self.model.parameters())
        trained = {p for p in self._owned.values() if p in self._optimizer.state}
        for name, parameter in self.model.named_parameters():
            if self._owned[name] in trained:
                total += 2 * parameter.numel() * parameter.element_size()
        return total + (1 << 20)


def write_checkpoint(
    folder: Path,
    step: int,
    tensors: CheckpointTensors,
    state: dict[str, Any],
    keep: int,
    unchanged: UnchangedFiles | None = None,
) -> Path:
    """Write ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints.

    Writing the same step again gives the same files.

    Args:
        folder: directory of the run's checkpoints.
        step: steps done.
        tensors: weights, optimizer state and averages. All other ranks that have a part of them
            call :meth:`CheckpointTensors.join` at the same time.
        state: further keys of ``state.json``.
        keep: number of checkpoints that stay.
        unchanged: files of earlier checkpoints of this process; None writes all files.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: the disk is full; earlier checkpoints stay valid.
    """
    final = folder / f"{PREFIX}{step:08d}"
    needed = tensors.count_bytes() - (0 if unchanged is None else unchanged.count_bytes(tensors))
    # A partial file is useless, so check the space before the first byte.
    storage.require_space(final, needed)
    with storage.disk_guard(final, needed), storage.staging_directory(final) as staging:
        save = _save_copies if unchanged is None else unchanged.save
        written = write_parts(tensors.model, staging, tensors.read_weight, save)
        for file, values in tensors.read_state():
            save(values, staging / f"{file}.safetensors")
            written.append(f"{file}.safetensors")
        known = {} if unchanged is None else unchanged.entries
        complete_checkpoint(staging, written, tensors.complete_state(step, state), known)
    if unchanged is not None:
        _take_over(unchanged, final, tensors.model)
    remove_old_checkpoints(folder, keep)
    return final


def _take_over(unchanged: UnchangedFiles, final: Path, model: TaskModel) -> None:
    """Let later checkpoints, and the final model, link the files of a finished one."""
    unchanged.commit(final, read_manifest(final)["files"])
    # The final model takes over what no task reads, and older checkpoints are removed.
    for file, each in model.unread.items():
        model.unread[file] = each._replace(path=final / f"{file}.safetensors")


def writes_beside_training(device: torch.device) -> bool:
    """Return whether whole checkpoints of a run on a device are written beside its steps.

    Args:
        device: that computes, so that a thread of the host may write.
    """
    return device.type == "cuda"


class BackgroundCheckpoints:
    """Writer of whole checkpoints beside the training; at most one is being written.

    A step waits only for the copies of the tensors that changed, in the host's memory::

        loop     step k  copy  step k+1  step k+2 …
        thread                 write, hash, rename

    Args:
        folder: directory of the run's checkpoints.
        tensors: weights, optimizer state and averages, whole.
        keep: number of checkpoints that stay.
        unchanged: files of earlier checkpoints of this process.
        on_written: called in the thread with each complete checkpoint and its step.
    """

    def __init__(
        self,
        folder: Path,
        tensors: CheckpointTensors,
        keep: int,
        unchanged: UnchangedFiles,
        on_written: Callable[[Path, int], None],
    ) -> None:
        self._folder, self._tensors, self._keep = folder, tensors, keep
        self._unchanged, self._on_written = unchanged, on_written
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[Path] | None = None
        #: File -> name -> copy, used again by each checkpoint: pinning memory takes long.
        self._copies: dict[str, dict[str, Tensor]] = {}

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Copy the tensors of a step, and begin to write them.

        Args:
            step: steps done.
            state: further keys of ``state.json``.

        Raises:
            UserError: the disk is full, now or for the checkpoint before.
        """
        self.finish()
        tensors, final = self._tensors, self._folder / f"{PREFIX}{step:08d}"
        needed = tensors.count_bytes() - self._unchanged.count_bytes(tensors)
        storage.require_space(final, needed)
        with contextlib.ExitStack() as stack:
            stack.enter_context(storage.disk_guard(final, needed))
            staging = stack.enter_context(storage.staging_directory(final))
            written, copied = [write_config(tensors.model, staging)], {}
            for file, values in chain(tensors.read_weights(), tensors.read_state()):
                name = f"{file}.safetensors"
                written.append(name)
                if not self._unchanged.link(values, staging / name):
                    copied[name] = self._copy(name, values)
            if any(x.is_cuda for x in tensors.model.parameters()):
                torch.cuda.current_stream().synchronize()
            complete = tensors.complete_state(step, state)
            opened = stack.pop_all()
        self._writing = self._thread.submit(
            self._write, opened, staging, final, written, copied, complete
        )

    def _copy(self, file: str, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        places = self._copies.setdefault(file, {})
        for name, value in values.items():
            if name not in places:
                places[name] = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
            places[name].copy_(value.detach(), non_blocking=True)
        return {name: places[name] for name in values}

    def _write(
        self,
        opened: contextlib.ExitStack,
        staging: Path,
        final: Path,
        written: list[str],
        copied: Mapping[str, Mapping[str, Tensor]],
        state: dict[str, Any],
    ) -> Path:
        with opened:
            for name, values in copied.items():
                self._unchanged.write(values, staging / name)
            complete_checkpoint(staging, written, state, self._unchanged.entries)
        _take_over(self._unchanged, final, self._tensors.model)
        remove_old_checkpoints(self._folder, self._keep)
        self._on_written(final, state["step"])
        return final

    def finish(self) -> Path | None:
        """Wait until the last checkpoint is complete, and return its folder; None without one."""
        writing, self._writing = self._writing, None
        return None if writing is None else writing.result()

    def close(self) -> Path | None:
        """Finish the last checkpoint, and end the thread; see :meth:`finish`."""
        with self._thread:
            return self.finish()


def complete_checkpoint(
    staging: Path,
    written: list[str],
    state: dict[str, Any],
    known: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Write the state and the manifest of a checkpoint, after all its tensors.

    Args:
        staging: folder of the files.
        written: their names.
        state: content of ``state.json``.
        known: name -> size and hash of files, as far as they are known.
    """
    text = json.dumps(state, indent=1, sort_keys=True)
    (staging / "state.json").write_text(text + "\n", encoding="utf-8")
    write_manifest(staging, [*written, "state.json"], known)


def remove_old_checkpoints(folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints, after the newest is complete.

    Args:
        folder: directory of the checkpoints.
        keep: number that stays.
    """
    for old in list_checkpoint_folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _require_unchanged(
    model: TaskModel, unread: Collection[str], optimizer: torch.optim.Optimizer
) -> None:
    trained = {id(x) for group in optimizer.param_groups for x in group["params"]}
    parameters = dict(model.named_parameters())
    for file, names in model.files_of().items():
        if file in unread and any(id(parameters[name]) in trained for name in names):
            raise ValueError(
                f"system {model.system}: needed_files leaves out {file}, which a task trains"
            )


def load_checkpoint(
    checkpoint: VerifiedCheckpoint,
    model: TaskModel,
    optimizer: torch.optim.Optimizer,
    average: WeightAverage | None = None,
    shards: "ModelShards | None" = None,
    best: BestWeights | None = None,
    left_out: Collection[str] = (),
) -> None:
    """Load a verified checkpoint's weights, optimizer state, averages and best weights.

    Args:
        checkpoint: verified, see :func:`pipelines.training.runs.checkpoints.verify_checkpoint`.
        model: receives the weights.
        optimizer: over the model's parameters; receives their state.
        average: receives the averaged weights.
        shards: receives this rank's part of each tensor instead of the model.
        best: receives the weights of the best validation.
        left_out: weights that this rank does not update; it needs neither state nor average.

    Raises:
        UserError: the checkpoint is of a model of another shape.
        ValueError: the system says that no task uses a file whose weights the optimizer trains.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    parameters = dict((shards or model).named_parameters())
    store = shards.store if shards is not None else None
    if checkpoint.unread:
        _require_unchanged(model, checkpoint.unread, optimizer)
    load_weights(checkpoint.path, model, store, checkpoint.unread, is_verified=True)

    def own_part(name: str, value: Tensor) -> Tensor:
        # The step count of a weight has no parts.
        part = value if shards is None or not value.ndim else shards.cut(name, value)
        return part.to(parameters[name].device, copy=True)

    def load_files(prefix: str) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        for name in read_manifest(checkpoint.path)["files"]:
            file = Path(name).stem.removeprefix(prefix)
            if name.startswith(prefix) and file not in checkpoint.unread:
                yield checkpoint.path / name, load_tensors(checkpoint.path / name)

    for path, tensors in load_files("optimizer-"):
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            # ``step`` is a scalar; the averages have the parameter's shape.
            expected = None if field == "step" else shapes.get(name)
            known = name in shapes and field in OPTIMIZER_STATE
            if not known or value.shape != (expected or ()):
                raise UserError(f"{path}: {key} is not the state of a parameter of this model")
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            if name not in left_out:
                optimizer.state[parameters[name]][field] = own_part(name, value)

    def load_copies(prefix: str, meaning: str, values: dict[str, Tensor]) -> None:
        for path, tensors in load_files(prefix):
            for name, value in tensors.items():
                if value.shape != shapes.get(name):
                    raise UserError(f"{path}: {name} is not {meaning} of a parameter of this model")
                values[name] = own_part(name, value)

    if best is not None:
        load_copies("best-", "the best value", best.values)
        try:
            best.load_dict(checkpoint.state.get("best"))
        except ValueError as error:
            raise UserError(f"{checkpoint.path / 'state.json'}: {error}") from None
    if average is None:
        return
    load_copies("average-", "the average", average.values)
    updates = checkpoint.state.get("average_updates", {})
    if not isinstance(updates, dict) or not all(type(n) is int for n in updates.values()):
        raise UserError(f"{checkpoint.path / 'state.json'}: average_updates are not numbers")
    average.updates = {name: n for name, n in updates.items() if name not in left_out}
    for name in left_out:
        average.values.pop(name, None)


def _to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Each tensor gets its own memory: gradients and averages may be views of a shared buffer.
    return {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
