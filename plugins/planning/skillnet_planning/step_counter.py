"""Counter of the tensors and operations of a training step that computes nothing.

The step runs on torch's fake tensors, which have shapes and no values. :class:`StepCounter` sees
each operation, forward and backward, and knows the bytes of all living tensors.
:func:`measure_step` is called by :mod:`skillnet_planning.memory_plan`.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, shape_wrapper

from pipelines.training.config.run import FinetuneConfig
from pipelines.training.loading.dataloader import Batch
from pipelines.training.loop.gradient_sync import GradientSync
from pipelines.training.loop.setup import NamedParameters, trainable_parameters
from pipelines.training.loop.step import backward_step, count_parts, step_loss
from skillnet.multitask_model import TaskModel
from skillnet.precision import ComputePrecision, assume_gpu
from skillnet.skills import find_task
from skillnet.skipped_init import SkippedInit
from skillnet.systems import build_system
from skillnet_planning.fake_weights import replace_weights
from skillnet_platform.cluster.gpu_types import GpuType
from skillnet_platform.errors import UserError

#: Operations that neither read nor write: allocations, and a view that torch does not call one.
_UNTOUCHED = (
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
    "_unsafe_view",
)


@dataclass(frozen=True)
class CountedOperation:
    """Traffic and arithmetic of one operation.

    Args:
        nbytes: bytes of inputs and outputs.
        flops: floating-point operations; only of products.
        is_bf16: it multiplies bf16 numbers.
    """

    nbytes: int
    flops: int
    is_bf16: bool

    def seconds(self, gpu: GpuType) -> float:
        """Return the shortest time on a GPU: of its memory traffic or its arithmetic."""
        rate = gpu.bf16_tflops if self.is_bf16 and gpu.has_bf16 else gpu.fp32_tflops
        return max(self.nbytes / (gpu.bandwidth_gb_s * 1e9), self.flops / (rate * 1e12))


@dataclass
class StepCost:
    """Cost of one forward and backward pass.

    Args:
        kept_bytes: tensors that live between the passes, without weights; 0 for a contrastive
            loss in micro-batches, which has several such moments.
        peak_bytes: largest sum of living tensors, without weights and gradients.
        operations: all of the pass.
    """

    kept_bytes: int
    peak_bytes: int
    operations: list[CountedOperation] = field(repr=False)

    @property
    def flops(self) -> int:
        """Floating-point operations of all products."""
        return sum(each.flops for each in self.operations)

    def seconds(self, gpu: GpuType) -> float:
        """Return the time of all operations by their rooflines."""
        return sum(each.seconds(gpu) for each in self.operations)


class StepCounter(TorchDispatchMode):
    """Mode that counts operations and the bytes of living tensors.

    Args:
        known: tensors that exist before, such as weights; they are not counted.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.operations: list[CountedOperation] = []
        # Storages by address: a weak reference ends a tensor's count.
        self._storages: dict[int, Any] = {}
        self._known = {x.untyped_storage()._cdata for x in known}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, unless it is known, until its last tensor ends."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = weakref.ref(storage, partial(self._remove, key, size))
        self.live += size
        self.peak = max(self.peak, self.live)

    def _remove(self, key: int, size: int, _: Any) -> None:
        del self._storages[key]
        self.live -= size

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        name = func.overloadpacket.__name__
        answer = _ANSWERS.get(name)
        out = answer(*args) if answer else func(*args, **options)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in outputs:
            self.add(tensor)
        if outputs and not func.is_view and name not in _UNTOUCHED:
            inputs = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
            formula = _FORMULAS.get(func.overloadpacket)
            self.operations.append(
                CountedOperation(
                    sum(x.numel() * x.element_size() for x in (*inputs, *outputs)),
                    int(formula(*args, **options, out_val=out)) if formula else 0,
                    any(x.dtype == torch.bfloat16 for x in inputs),
                )
            )
        return out


def _ctc(log_probs: Tensor, targets: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    T, B, _symbols = log_probs.shape
    return log_probs.new_empty(B), log_probs.new_empty(B, T, 2 * targets.shape[1] + 1)


def _ctc_backward(gradient: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(log_probs)


def _grouped_product_flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    # Each row of the first matrix is multiplied by the matrix of one group.
    return int(2 * a[0] * a[1] * b[-1])


#: Operations -> their floating-point operations by the shapes of inputs and output.
_FORMULAS: Any = {
    torch.ops.aten._grouped_mm: shape_wrapper(_grouped_product_flops),
    **flop_registry,
}

#: Operations whose result depends on values -> a tensor of the same shape.
_ANSWERS: dict[str, Any] = {
    "_ctc_loss": _ctc,
    "_ctc_loss_backward": _ctc_backward,
    "_use_cudnn_ctc_loss": lambda *_: False,
}


class PlannedModel:
    """Model of a run on fake tensors.

    Args:
        config: settings of the run.

    Raises:
        UserError: the system cannot be built.
    """

    def __init__(self, config: FinetuneConfig) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.config = config
        self.fake = FakeTensorMode()
        with torch.device("meta"), SkippedInit():
            self.model: TaskModel = build_system(config.system, config.model, config.options)
        with self.fake:
            replace_weights(self.model, torch.device("cpu"))
        self.model.train()
        self.active: dict[str, NamedParameters] = trainable_parameters(self.model, config)


def measure_step(
    planned: PlannedModel,
    batch: Batch,
    precision: str,
    micro_batch_size: int | None = None,
    kept_tokens: int | None = None,
) -> StepCost:
    """Count the forward and backward pass of a batch.

    Gradients exist before the step, as views of buckets do; so they are not part of the cost.

    Args:
        planned: the model.
        batch: built with the fake tensors of the model.
        precision: ``bf16`` or ``fp32``.
        micro_batch_size: rows that are computed at a time; None computes all at once.
        kept_tokens: tokens whose tensors are kept; None keeps all.

    Raises:
        ValueError: the system cannot compute layers again.
        UserError: the operations of the system depend on values, which do not exist here.
    """
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )

    model = planned.model
    model.limit_kept_tokens(kept_tokens)
    training = replace(planned.config.training, micro_batch_size=micro_batch_size)
    config = replace(planned.config, training=training)
    compute = ComputePrecision(precision, torch.device("cpu"))
    task = find_task(batch.task, config.model.tasks)
    is_split = count_parts(len(batch.rows), 1, micro_batch_size) > 1
    try:
        with planned.fake, assume_gpu():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            known = [*model.parameters(), *model.buffers(), *gradients]
            with StepCounter(known) as counter:
                for tensors in (*batch.towers.values(), batch.targets):
                    for tensor in tensors.values():
                        counter.add(tensor)
                if is_split:
                    kept = 0
                    sync = GradientSync({}, 1, 1.0)
                    backward_step(model, batch, compute, config, sync)
                else:
                    loss = step_loss(model, task, batch, compute, config)
                    kept = counter.live
                    loss.backward()
        return StepCost(kept, counter.peak, counter.operations)
    except (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    ) as error:
        raise UserError(
            f"system {config.system}: its operations depend on the data ({error}), so its memory "
            "cannot be planned. Measure it on the GPU."
        ) from error
