"""Residency of weights: a device holds those of the current and of the next step, the host all.

The task of each step is a pure function of the seed and the step, so the next step's weights are
known while the current step computes::

    step           17 text_to_image          18 masked_sound          19 masked_sound
    device         compute with image        compute with sound       compute with sound
    copy stream    load sound                store image              -

A weight travels with its optimizer state and its average. Skills, stems and heads are all treated
alike: the unit is a parameter, and a task needs those of :meth:`TaskModel.active_parameters`. The
training loop calls :class:`WeightResidency` with ``training.sharding`` host. On a CPU
the host's memory is a second copy, so that tests exercise the same code.

Weights of skills that no task of the run activates lie in files that all workers of a node map:
those of the checkpoint or of the initial weights, or :class:`SharedMemory`.
"""

import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from pipelines.training.loop.optimizer import WeightAverage
from skillnet.multitask_model import TaskModel
from skillnet_platform import storage

#: Bytes of the first and of the largest file of :class:`SharedMemory`; each is twice as large as
#: the one before.
FIRST_SHARED_BYTES, SHARED_BYTES = 2**20, 64 * 2**20
#: Places of weights in it start at multiples of this number of bytes, as those of torch do.
ALIGNMENT = 64
#: Fields of a parameter that are not optimizer state.
WEIGHT, AVERAGE = "weight", "average"
#: Name of a parameter, and one of the fields or of the optimizer's keys.
TensorKey = tuple[str, str]


class WeightResidency:
    """Residency of a model's weights, their optimizer state and their averages on a device.

    The tensors of a step and of the next one lie on the device, and those of the step before until
    they are copied. All others lie in the host's memory, where any code can read them after
    :meth:`settle`. Parameters keep their identity: only their data moves.

    An evaluation loads one task after the other, by the ``weight_loader`` of the model.

    Args:
        model: in the host's memory. Its buffers move to the device.
        optimizer: AdamW over its parameters, with the state of a checkpoint or none.
        average: running mean of its weights, or None.
        device: device of the forward pass, such as ``cuda:0``.
        tasks: names of the tasks that are trained or evaluated. Weights that none of them uses
            stay where they are.
    """

    def __init__(
        self,
        model: TaskModel,
        optimizer: torch.optim.Optimizer,
        average: WeightAverage | None,
        device: torch.device,
        tasks: Iterable[str],
    ) -> None:
        self._model, self._device = model, device
        self._optimizer: torch.optim.Optimizer | None = optimizer
        self._average = average
        self._parameters = dict(model.named_parameters())
        #: Task -> names of the weights that it uses.
        self._used = {task: [name for name, _ in model.active_parameters(task)] for task in tasks}
        # A step has a thousand tensors: their keys are listed again only after the first updates.
        self._keys: dict[str, list[TensorKey]] = {}
        self._fields: dict[str, list[str]] = {}
        self._complete: set[str] = set()
        #: Tensors that lie on the device.
        self._resident: set[TensorKey] = set()
        #: Task of the last step or forward pass.
        self._task: str | None = None
        self._stream = CopyStream(device)
        # Sources of copies to the host, until the device has made them.
        self._leaving: list[Tensor] = []
        # Each tensor keeps its place in the host's memory also while it is on the device.
        self._places: dict[TensorKey, Tensor] = {}
        for name in dict.fromkeys(chain.from_iterable(self._used.values())):
            self._fields[name] = self._list_fields(name)
            for key in [(name, field) for field in self._fields[name]]:
                self._places[key] = place = self._stream.pin(self._read(key))
                self._assign(key, place)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(device)
        model.weight_loader = self.load_task

    def begin_step(self, task: str, following: str | None) -> None:
        """Let the device wait for a step's tensors, and start to load those of the next step.

        Args:
            task: name of the task that the step trains.
            following: task of the next step; None after the last one.
        """
        self._find_new_tensors()
        needed = self._keys_of(task)
        # The step before has loaded them, unless this is the first one or follows an evaluation.
        self._load(needed)
        self._wait()
        ahead = [] if following is None else self._keys_of(following)
        self._load(ahead)
        self._store({*needed, *ahead})
        self._task = task

    def load_task(self, task: str) -> None:
        """Load the weights of a task that is evaluated, without state; store all other tensors.

        Args:
            task: name of a task of the model.
        """
        if task == self._task:
            return
        self._find_new_tensors()
        needed = [(name, WEIGHT) for name in self._used[task]]
        self._load(needed)
        self._store(set(needed))
        self._wait()
        self._task = task
        # The training mode drops merged weights, which would pile up from task to task.
        was_training = self._model.training
        self._model.train().train(was_training)

    def settle(self) -> None:
        """Wait until the host can read all tensors in its memory."""
        self._wait()
        self._stream.synchronize()

    def drop_state(self) -> None:
        """Forget optimizer and average: the training is over, and only weights are evaluated."""
        self.settle()
        self._optimizer = self._average = None
        self._places = {key: x for key, x in self._places.items() if key[1] == WEIGHT}
        self._resident = {key for key in self._resident if key[1] == WEIGHT}
        self._fields = {name: [WEIGHT] for name in self._fields}
        self._keys.clear()

    def _keys_of(self, task: str) -> list[TensorKey]:
        if task not in self._keys:
            names = self._used[task]
            self._keys[task] = [(name, field) for name in names for field in self._fields[name]]
        return self._keys[task]

    def _list_fields(self, name: str) -> list[str]:
        fields, parameter = [WEIGHT], self._parameters[name]
        if self._optimizer is not None and parameter in self._optimizer.state:
            fields += self._optimizer.state[parameter]
        if self._average is not None and name in self._average.values:
            fields.append(AVERAGE)
        return fields

    def _find_new_tensors(self) -> None:
        # The first update of a weight makes its state, and its average, on the device.
        if self._task is None or self._optimizer is None:
            return
        for name in self._used[self._task]:
            if name not in self._complete and self._parameters[name].requires_grad:
                fields = self._list_fields(name)
                self._resident.update((name, x) for x in fields if x not in self._fields[name])
                self._fields[name] = fields
                self._keys.clear()
                has_state = bool(self._optimizer.state.get(self._parameters[name]))
                if has_state and (self._average is None or AVERAGE in fields):
                    self._complete.add(name)

    def _load(self, keys: list[TensorKey]) -> None:
        missing = [key for key in keys if key not in self._resident]
        sources = [self._places[key] for key in missing]
        # Allocated for the stream that computes, which the copies wait for.
        targets = [torch.empty_like(source, device=self._device) for source in sources]
        self._stream.copy(targets, sources)
        for key, target in zip(missing, targets, strict=True):
            self._assign(key, target)
        self._resident.update(missing)

    def _store(self, kept: set[TensorKey]) -> None:
        """Copy all tensors but the kept ones to the host."""
        leaving = sorted(self._resident - kept)
        sources = [self._read(key) for key in leaving]
        for key, source in zip(leaving, sources, strict=True):
            if key not in self._places:
                self._places[key] = self._stream.pin(torch.empty_like(source, device="cpu"))
        self._stream.copy([self._places[key] for key in leaving], sources)
        self._leaving += sources
        for key in leaving:
            self._assign(key, self._places[key])
        self._resident.difference_update(leaving)

    def _wait(self) -> None:
        self._stream.wait()
        self._leaving.clear()

    def _read(self, key: TensorKey) -> Tensor:
        name, field = key
        parameter = self._parameters[name]
        if field == WEIGHT:
            return parameter.data
        if field == AVERAGE:
            assert self._average is not None
            return self._average.values[name]
        assert self._optimizer is not None
        value: Tensor = self._optimizer.state[parameter][field]
        return value

    def _assign(self, key: TensorKey, value: Tensor) -> None:
        name, field = key
        parameter = self._parameters[name]
        if field == WEIGHT:
            parameter.data = value
        elif field == AVERAGE:
            assert self._average is not None
            self._average.values[name] = value
        else:
            assert self._optimizer is not None
            self._optimizer.state[parameter][field] = value


class SharedMemory:
    """Memory of tensors in files that all workers of a node map, so that it holds one copy.

    All workers of a run build the same values. Each writes them to the same places, so they need
    no order. Pages of a file are no private memory: the system may write them to the disk.

    Args:
        folder: directory of the files, equal in all workers of the node. It can be removed when
            all of them have built their tensors.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._files = folder, 0
        self._left = torch.empty(0, dtype=torch.uint8)

    def __call__(self, x: Tensor) -> Tensor:
        """Return a copy of a tensor in this memory.

        Args:
            x: on the host.

        Raises:
            UserError: the disk is full.
        """
        size = -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        if size > len(self._left):
            usual = min(FIRST_SHARED_BYTES << self._files, SHARED_BYTES)
            self._left = self._open_file(max(size, usual))
        place, self._left = self._left[: x.nbytes], self._left[size:]
        return place.view(x.dtype).view(x.shape).copy_(x)

    def _open_file(self, size: int) -> Tensor:
        path = self._folder / str(self._files)
        self._files += 1
        # A map of a file without its blocks would end the process when the disk is full.
        with storage.disk_guard(path, size), path.open("ab") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.write(bytes(size))
        return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


class CopyStream:
    """Stream of copies between the host's memory and a device, beside the stream that computes.

    Args:
        device: a GPU. On a CPU each copy is complete when the call returns.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def pin(self, x: Tensor) -> Tensor:
        """Return a tensor in pinned memory, from which copies to a GPU are asynchronous."""
        return x if self._stream is None else x.pin_memory()

    def copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
        """Copy tensors after all work that the device has been given; neither side waits.

        Args:
            targets: receive the values.
            sources: as many tensors.
        """
        if self._stream is None:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source)
            return
        if not targets:
            return
        computed = torch.Event(self._device)
        computed.record()
        self._stream.wait_event(computed)
        with self._stream:
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """Let the work that the device gets from now on wait for all copies before."""
        if self._stream is not None:
            self._stream.record_event().wait()

    def synchronize(self) -> None:
        """Let the host wait for all copies."""
        if self._stream is not None:
            self._stream.synchronize()
