"""Compilation of a layer with ``torch.compile``.

Merged weights are inputs of its graph, so all layers, and all plans with as many skills, have one
graph, and a step merges its weights once for all towers. Lengths and rows are symbols of the graph,
and lengths are padded to a multiple, so no batch needs another graph.

Shapes: B batch, T tokens, D model width.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skillnet.layers import LayerWeights

#: Lengths are padded to a multiple of this number of tokens, as products of GPUs prefer.
TOKEN_MULTIPLE = 8

#: Function of a layer's class: the layer, tokens, merged weights, padding, and rows that are kept.
LayerMethod = Callable[..., Tensor]


class LayerCompiler:
    """Compiled variants of the computation of a layer, shared by all layers of a run.

    ``torch.compile`` keeps the graphs of a function with its code, at most eight, and then runs it
    uncompiled. Therefore each variant gets a copy of the function. A variant that cannot be
    compiled is computed as without compilation.

    Args:
        report: receives the reason why layers are not compiled, once.
        backend: compiler that ``torch.compile`` uses, such as ``inductor``.
    """

    def __init__(
        self, report: Callable[[str], None], backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._report, self._backend = report, backend
        # Variant -> compiled function; None computes without compilation.
        self._compiled: dict[tuple[Any, ...], LayerMethod | None] = {}
        self._has_failed = False

    # Graphs stay in the process that compiled them.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compiled": {}}

    def find_compiled(
        self, layer: Any, method: LayerMethod, x_BTD: Tensor, weights: LayerWeights, *rest: Any
    ) -> LayerMethod | None:
        """Return the compiled variant for some inputs; it is compiled at its first use.

        Args:
            layer: is computed.
            method: function of its class.
            x_BTD: tokens; see :func:`pad_tokens`.
            weights: inputs of the graph. Their values may be any, see :meth:`EncoderLayer.prepare`.
            *rest: padding, and weights of rows or None.

        Returns:
            None if the variant cannot be compiled.
        """
        # What decides on the operations of a graph, beside sizes.
        key = (
            weights.describe(),
            *(type(each) for each in rest),
            torch.is_grad_enabled(),
            x_BTD.requires_grad,
            x_BTD.dtype,
            torch.is_autocast_enabled(x_BTD.device.type),
        )
        if key not in self._compiled:
            self._compiled[key] = self._compile(layer, method, x_BTD, weights, rest)
        return self._compiled[key]

    def _compile(
        self,
        layer: Any,
        method: LayerMethod,
        x_BTD: Tensor,
        weights: LayerWeights,
        rest: tuple[Any, ...],
    ) -> LayerMethod | None:
        # With the compiler of torch, whose import takes seconds.
        from torch.fx.experimental import _config as shape_config

        own = _copy_function(method, f"compute_layer_{len(self._compiled)}")
        compiled = torch.compile(own, fullgraph=True, dynamic=True, backend=self._backend)
        patched = shape_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
        devices = [x_BTD.device] if x_BTD.device.type == "cuda" else []
        # The trial draws random numbers, and the step must not notice. Sizes that are equal in this
        # batch, such as its rows and the width of the model, are not always equal.
        with torch.random.fork_rng(devices), patched, _keep_saved_tensors():
            try:
                trial_BTD = x_BTD.detach().requires_grad_(x_BTD.requires_grad)
                # Sizes of weights are numbers of the graph, for which the compiler chooses kernels.
                for each in weights.list_tensors():
                    torch._dynamo.mark_static(each)
                y_BTD = compiled(layer, trial_BTD, weights, *rest)
                given = [trial_BTD, *weights.list_tensors()]
                if learned := [each for each in given if each.requires_grad]:
                    # The backward pass may be compiled only when it is needed.
                    torch.autograd.grad(y_BTD.float().sum(), learned[:1])
            except Exception as error:  # any library that takes part in the compilation
                cause = find_cause(error)
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
                if not self._has_failed:
                    self._has_failed = True
                    lines = str(cause).strip().splitlines()
                    self._report(f"{type(cause).__name__}: {lines[0] if lines else ''}")
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
    """Return a block that hides the trial from layers computed again, which count tensors."""
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
