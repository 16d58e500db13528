"""Compilation of the encoder with ``torch.compile``: one callable and one graph per plan.

torch keeps the graphs of a function with its code, at most eight, and then runs it uncompiled. The
plans of the default tasks alone have more. Therefore each plan gets a copy of the function. Lengths
and rows are symbols of the graph, and lengths are padded to a multiple, so no batch needs another
graph. :meth:`PlanCompiler.run` is called by :class:`skillnet.encoder.Encoder`.

Shapes: B batch, T tokens, D model width.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.layers import Skills

#: Lengths are padded to a multiple of this number of tokens, as products of GPUs prefer.
TOKEN_MULTIPLE = 8

Encode = Callable[[Any, Tensor, Skills, Tensor | None], Tensor]


class PlanCompiler:
    """Compiled variants of an encoder's forward pass.

    A plan that cannot be compiled is computed as without compilation.

    Args:
        report: receives one line per plan that cannot be compiled: its skills, and the reason.
        backend: of ``torch.compile``.
    """

    def __init__(
        self, report: Callable[[Skills, str], None], backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._report, self._backend = report, backend
        # Variant -> compiled function; None computes without compilation.
        self._compiled: dict[tuple[Any, ...], Callable[..., Tensor] | None] = {}
        self._failed: set[Skills] = set()

    # Graphs stay in the process that compiled them.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def run(
        self, owner: Any, encode: Encode, x_BTD: Tensor, skills: Skills, mask_BT: Tensor | None
    ) -> Tensor:
        """Encode tokens (B, T, D), compiled at the first batch of a plan.

        Args:
            owner: encoder.
            encode: function of the encoder's class.
            x_BTD: tokens of a stem.
            skills: active skills, sorted.
            mask_BT: True at real tokens; None if all are real.
        """
        T = x_BTD.shape[1]
        inputs: tuple[Tensor, Tensor | None] = x_BTD, mask_BT
        if mask_BT is not None:
            more = -T % TOKEN_MULTIPLE
            inputs = F.pad(x_BTD, (0, 0, 0, more)), F.pad(mask_BT, (0, more))
        # What decides on the operations of a graph, beside sizes.
        key = (
            skills,
            mask_BT is None,
            owner.training,
            torch.is_grad_enabled(),
            x_BTD.requires_grad,
            x_BTD.dtype,
            torch.is_autocast_enabled(x_BTD.device.type),
        )
        if key not in self._compiled:
            self._compiled[key] = self._compile(owner, encode, skills, inputs)
        compiled = self._compiled[key]
        if compiled is None:
            return encode(owner, x_BTD, skills, mask_BT)
        return compiled(owner, inputs[0], skills, inputs[1])[:, :T]

    def _compile(
        self, owner: Any, encode: Encode, skills: Skills, inputs: tuple[Tensor, Tensor | None]
    ) -> Callable[..., Tensor] | None:
        # With the compiler of torch, whose import takes seconds.
        from torch.fx.experimental import _config as shape_config

        own = _copy_function(encode, f"encode_{'_'.join(skills)}_{len(self._compiled)}")
        compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=self._backend)
        device = inputs[0].device
        patched = shape_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        devices = [device] if device.type == "cuda" else []
        # The trial draws random numbers, and the step must not notice. Sizes that are equal in this
        # batch, such as its rows and the width of the model, are not always equal.
        with torch.random.fork_rng(devices), patched:
            try:
                x_BTD = inputs[0].detach().requires_grad_(inputs[0].requires_grad)
                y_BTD = compiled(owner, x_BTD, skills, inputs[1])
                if y_BTD.requires_grad and x_BTD.requires_grad:
                    # The backward pass may be compiled only when it is needed.
                    torch.autograd.grad(y_BTD.float().sum(), x_BTD)
            except Exception as error:  # any library that takes part in the compilation
                cause = find_cause(error)
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                if skills not in self._failed:
                    self._failed.add(skills)
                    lines = str(cause).strip().splitlines()
                    self._report(skills, f"{type(cause).__name__}: {lines[0] if lines else ''}")
                return None
        return compiled


def find_cause(error: BaseException) -> BaseException:
    """Return the error that made others fail."""
    # torch has the error of a backend in this attribute.
    while (inner := getattr(error, "inner_exception", None) or error.__cause__) is not None:
        error = inner
    return error


def _copy_function(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a function with code of its own, so that torch keeps its graphs apart."""
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(
        code, function.__globals__, name, function.__defaults__, function.__closure__
    )
