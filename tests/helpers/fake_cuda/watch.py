"""Record of the operations, host waits and copies of code that runs on fake CUDA tensors.

Operations whose result depends on values are answered here, so that the code continues. A GPU would
make the host wait for them. Waits inside an operation are known from torch's sources:
``LossCTC.cu`` copies three lists of lengths to the device, forward and backward, and waits.
"""

import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[3]
PACKAGES = tuple(str(ROOT / name) for name in ("skillnet", "pipelines"))

#: Operations that launch no kernel, beside views; copies are counted apart. ``_unsafe_view`` is a
#: view that torch does not call one.
NO_KERNEL = {
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
    "_unsafe_view",
    "_to_copy",
}
#: Products of matrices. Their bytes are not counted: every system reads its weights for them.
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
NOT_COMPUTING = {
    "detach",
    "device",
    "is_pinned",
    "lift_fresh",
    "_record_function_enter_new",
    "_record_function_exit",
}
#: Operations whose result has a size or a value that only the device knows.
WAITING = {"masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


def is_cuda(x: Any) -> bool:
    """Return whether a value is a tensor of the fake device."""
    return isinstance(x, Tensor) and x.device.type == "cuda"


class DeviceWatch(TorchDispatchMode):
    """Mode that records what a GPU and its host would do.

    Attributes:
        waits: place in the code -> number of host waits.
        blocking_copies: places of copies to the device for which the host waits.
        cpu_operations: names of operations on tensors of the CPU.
        operations: number of operations on the device.
        nbytes: bytes of inputs and outputs of these operations, without products.
        biased: number of forward passes of attention with a bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.blocking_copies: list[str] = []
        self.cpu_operations: Counter[str] = Counter()
        self.operations = self.nbytes = self.biased = 0

    def _wait(self, reason: str, count: int = 1) -> None:
        self.waits[f"{reason} at {find_place()}"] += count

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, options)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense":
            if is_cuda(args[0]):
                self._wait("item()")
            return _example_value(args[0])
        if name == "_pin_memory":
            return args[0]
        if any(is_cuda(x) for x in inputs):
            answer = self._answer(name, args, options)
            if answer is not None:
                self.operations += 1
                return answer
            if name in INDEXING:
                args = (args[0], self._without_masks(name, args[1]), *args[2:])
        out = func(*args, **options)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self._record_copy(name, args, options, inputs, outputs)
        if any(is_cuda(x) for x in (*inputs, *outputs)):
            is_computing = not func.is_view and name not in NO_KERNEL | NOT_COMPUTING
            self.operations += is_computing
            self.biased += name == "_scaled_dot_product_efficient_attention"
            if (is_computing or name == "_to_copy") and name not in PRODUCTS:
                # A tensor that is written into is an input and the output.
                tensors = {id(x): x for x in (*inputs, *outputs)}.values()
                self.nbytes += sum(x.numel() * x.element_size() for x in tensors)
        elif not func.is_view and name not in NO_KERNEL | NOT_COMPUTING:
            self.cpu_operations[name] += 1
        return out

    def _answer(self, name: str, args: Sequence[Any], options: Mapping[str, Any]) -> Any:
        """Return the result of an operation whose values are needed; None for all others."""
        if name in ("equal", "is_nonzero"):
            self._wait(name)
            return True
        if name == "nonzero":
            self._wait("nonzero()")
            x = args[0]
            return torch.empty(max(x.numel() // 2, 1), x.dim(), dtype=torch.long, device=x.device)
        if name == "bincount":
            self._wait("bincount", 2)  # smallest and largest number
            length = options.get("minlength", args[2] if len(args) > 2 else 0)
            return torch.zeros(length, dtype=torch.long, device=args[0].device)
        if name in ("_use_cudnn_ctc_loss", "_use_miopen_ctc_loss"):
            return False  # cuDNN takes int32
        if name == "_ctc_loss":
            log_probs, targets = args[:2]
            self._wait("ctc_loss uploads lengths", 3)
            T, B, _ = log_probs.shape
            alpha = log_probs.new_empty(B, T, 2 * targets.shape[1] + 1)
            return log_probs.new_empty(B), alpha
        if name == "_ctc_loss_backward":
            self._wait("backward of ctc_loss uploads lengths", 3)
            return torch.empty_like(args[1])
        if name in WAITING:
            self._wait(name)
        return None

    def _without_masks(self, name: str, indices: Sequence[Any]) -> list[Any]:
        """Replace masks by numbers, for which the host waits."""
        found: list[Any] = []
        for index in indices:
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                self._wait(f"{name} by a mask")
                count = max(index.numel() // 2, 1)
                numbers = torch.empty(count, dtype=torch.long, device=index.device)
                found += [numbers] * index.dim()
            else:
                found.append(index)
        return found

    def _record_copy(
        self,
        name: str,
        args: Sequence[Any],
        options: Mapping[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
    ) -> None:
        if name == "_to_copy":
            source, target = inputs[0], outputs[0]
            is_asynchronous = bool(options.get("non_blocking"))
        elif name == "copy_" and len(inputs) > 1:
            target, source = inputs[:2]
            is_asynchronous = bool(options.get("non_blocking", len(args) > 2 and args[2]))
        else:
            return
        if is_cuda(source) == is_cuda(target):
            self.operations += name == "_to_copy" and is_cuda(source)
        elif is_cuda(target):
            self.operations += 1
            if not is_asynchronous:
                self.blocking_copies.append(find_place())
        elif not is_asynchronous:
            self._wait("copy to the host")


def find_place() -> str:
    """Return the innermost line of the project on the stack."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGES)]
    if not frames:
        return "the backward pass or the test"
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"


def _example_value(x: Tensor) -> Any:
    if x.dtype == torch.bool:
        return False  # ends a loop such as that of truncated normal numbers
    return 0.0 if x.is_floating_point() else 1


def answer_values() -> None:
    """Let torch take the fake device for an H100, and fake tensors for tensors with values."""
    # Autocast turns itself off without a device.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda *_, **__: None
    # Events of torch.cuda ask the driver for a stream; those of torch ask the fake device.
    torch.cuda.Event = lambda: torch.Event("cuda")
    fake: Any = FakeTensor
    fake.numpy = lambda self: np.zeros(self.shape, dtype=np.float32)
    fake.data_ptr = lambda self: id(self)
    plain = F.scaled_dot_product_attention

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        # Flash attention takes no bias; the memory-efficient kernel does.
        if not is_cuda(q):
            return plain(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **others)
        if attn_mask is None and q.dtype in (torch.bfloat16, torch.float16):
            return torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, dropout_p, is_causal, scale=scale
            )[0]
        bias = None
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                empty = torch.zeros_like(attn_mask, dtype=q.dtype)
                attn_mask = empty.masked_fill(~attn_mask, float("-inf"))
            bias = attn_mask.expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
        )[0]

    F.scaled_dot_product_attention = attend
