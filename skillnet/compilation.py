"""Compilation of the encoder with ``torch.compile``: one callable and one graph per plan.

torch keeps the graphs of a function with its code, at most eight, and then runs it uncompiled. The
plans of the default tasks alone have more. Therefore each plan gets a copy of the function. Lengths
and rows are symbols of the graph, and lengths are padded to a multiple, so no batch needs another
graph. :class:`skillnet.encoder.Encoder` calls :meth:`PlanCompiler.find_compiled`.

Sharded weights exist only around the call of a layer. Their layers are compiled instead: one
callable and one graph per plan and kind of layer.

Shapes: B batch, T tokens, D model width.
"""

import types
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.layers import Skills

#: Lengths are padded to a multiple of this number of tokens, as products of GPUs prefer.
TOKEN_MULTIPLE = 8

#: Function of a module's class: the module, tokens, active skills, and further tensors or None.
TokenMethod = Callable[..., Tensor]


class PlanCompiler:
    """Compiled variants of the forward pass of an encoder, or of its layers.

    A plan that cannot be compiled is computed as without compilation.

    Args:
        report: receives one line per plan that cannot be compiled: its skills, and the reason.
        backend: compiler that ``torch.compile`` uses, such as ``inductor``.
    """

    def __init__(
        self, report: Callable[[Skills, str], None], backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._report, self._backend = report, backend
        # Variant -> compiled function; None computes without compilation.
        self._compiled: dict[tuple[Any, ...], TokenMethod | None] = {}
        self._failed: set[Skills] = set()

    # Graphs stay in the process that compiled them.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def find_compiled(
        self,
        owner: Any,
        method: TokenMethod,
        x_BTD: Tensor,
        skills: Skills,
        *rest: Any,
        kind: Hashable = None,
    ) -> TokenMethod | None:
        """Return the compiled function of a plan; the first batch of the plan compiles it.

        Args:
            owner: module that is computed.
            method: function of its class.
            x_BTD: tokens; see :func:`pad_tokens`.
            skills: active skills, sorted.
            *rest: further inputs, tensors or None.
            kind: class of the module. Modules of one kind differ in values only, and share their
                graphs.

        Returns:
            None if the plan cannot be compiled.
        """
        # What decides on the operations of a graph, beside sizes.
        key = (
            kind,
            skills,
            *(each is None for each in rest),
            owner.training,
            torch.is_grad_enabled(),
            x_BTD.requires_grad,
            x_BTD.dtype,
            torch.is_autocast_enabled(x_BTD.device.type),
        )
        if key not in self._compiled:
            self._compiled[key] = self._compile(owner, method, x_BTD, skills, rest)
        return self._compiled[key]

    def _compile(
        self,
        owner: Any,
        method: TokenMethod,
        x_BTD: Tensor,
        skills: Skills,
        rest: tuple[Any, ...],
    ) -> TokenMethod | None:
        # With the compiler of torch, whose import takes seconds.
        from torch.fx.experimental import _config as shape_config

        own = _copy_function(method, f"encode_{'_'.join(skills)}_{len(self._compiled)}")
        compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=self._backend)
        patched = shape_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        devices = [x_BTD.device] if x_BTD.device.type == "cuda" else []
        # The trial draws random numbers, and the step must not notice. Sizes that are equal in this
        # batch, such as its rows and the width of the model, are not always equal.
        with torch.random.fork_rng(devices), patched, _keep_saved_tensors():
            try:
                trial_BTD = x_BTD.detach().requires_grad_(x_BTD.requires_grad)
                y_BTD = compiled(owner, trial_BTD, skills, *rest)
                if y_BTD.requires_grad and trial_BTD.requires_grad:
                    # The backward pass may be compiled only when it is needed.
                    torch.autograd.grad(y_BTD.float().sum(), trial_BTD)
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


def pad_tokens(x_BTD: Tensor, mask_BT: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return tokens and mask with a length that is a multiple of :data:`TOKEN_MULTIPLE`.

    Args:
        x_BTD: tokens.
        mask_BT: True at real tokens; None if all rows have the one length of their plan.
    """
    if mask_BT is None:
        return x_BTD, None
    more = -x_BTD.shape[1] % TOKEN_MULTIPLE
    return F.pad(x_BTD, (0, 0, 0, more)), F.pad(mask_BT, (0, more))


def _keep_saved_tensors() -> torch.autograd.graph.saved_tensors_hooks:
    """Return a block that hides the trial from activation checkpointing, which counts tensors."""
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


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
