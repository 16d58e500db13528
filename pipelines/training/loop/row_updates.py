"""AdamW that updates only the rows of embedding tables that have a gradient.

A batch uses a few thousand rows of its tables. AdamW walks all of them: their weights, gradients
and both averages. :func:`use_sparse_gradients` lets the tables give sparse gradients, and
:class:`RowSparseAdamW` updates their rows. The training loop uses both for
``training.sparse_embeddings``.
"""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.training.loop.eager_adamw import EagerAdamW


def use_sparse_gradients(model: nn.Module) -> list[Tensor]:
    """Let the embedding tables of a model give sparse gradients; return their weights.

    A table that is also the output layer of a task gets a dense gradient from that task.

    Args:
        model: changed in place.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    for table in tables:
        table.sparse = True
    return [table.weight for table in tables]


class RowSparseAdamW(EagerAdamW):
    """AdamW with lazy updates of the rows of tables, as in ``torch.optim.SparseAdam``.

    A row whose gradient is zero keeps its weight and its averages: no weight decay and no step in
    the direction of earlier gradients. The step count belongs to the table. All other parameters
    are updated by AdamW. State has AdamW's names and shapes, so checkpoints are the same.

    Args:
        groups: see :class:`torch.optim.AdamW`.
        tables: weights of shape (rows, width) among them, on a CPU.
        options: see :class:`torch.optim.AdamW`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], tables: Collection[Tensor], **options: Any
    ) -> None:
        super().__init__(groups, **options)
        self._tables = set(tables)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient, unless ``found_inf`` is set."""
        assert closure is None
        waiting: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in self._tables and parameter.grad is not None:
                    waiting.append((parameter, parameter.grad, group))
                    # AdamW skips a parameter without a gradient.
                    parameter.grad = None
        super().step()
        found_inf = getattr(self, "found_inf", None)
        # Tables are on a CPU, so this waits for no device.
        is_skipped = found_inf is not None and bool(found_inf)
        for parameter, gradient, group in waiting:
            parameter.grad = gradient
            self._update_rows(parameter, gradient, group, is_skipped)

    def _update_rows(
        self, parameter: Tensor, gradient: Tensor, group: dict[str, Any], is_skipped: bool
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        if is_skipped:
            return
        state["step"] += 1
        count, (beta1, beta2) = state["step"].item(), group["betas"]
        rows_R, gradient_RD = _find_rows(gradient)
        mean_RD = state["exp_avg"][rows_R].lerp_(gradient_RD, 1 - beta1)
        square_RD = state["exp_avg_sq"][rows_R].mul_(beta2)
        square_RD.addcmul_(gradient_RD, gradient_RD, value=1 - beta2)
        state["exp_avg"][rows_R] = mean_RD
        state["exp_avg_sq"][rows_R] = square_RD
        scale_RD = square_RD.div_(1 - beta2**count).sqrt_().add_(group["eps"])
        weight_RD = parameter[rows_R].mul_(1 - group["lr"] * group["weight_decay"])
        weight_RD.addcdiv_(mean_RD, scale_RD, value=-group["lr"] / (1 - beta1**count))
        parameter[rows_R] = weight_RD


def clip_sparse_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients, of which some are sparse, to a global norm of at most ``max_norm``.

    The formula is that of ``torch.nn.utils.clip_grad_norm_``, which takes dense gradients only.

    Args:
        parameters: a sparse gradient gets each row once.
        max_norm: largest norm.

    Returns:
        The norm before scaling.
    """
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        if gradient.is_sparse:
            gradient = parameter.grad = gradient.coalesce()
            # Its values are not copied, so scaling them scales the gradient.
            gradient = gradient.values()
        gradients.append(gradient)
    norm = nn.utils.get_total_norm(gradients, foreach=True)
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _find_rows(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the numbers of the rows with a gradient, (R,), and their gradients, (R, D)."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        rows_S, values_SD = gradient.indices()[0], gradient.values()
        is_used_S = values_SD.any(1)
        return rows_S[is_used_S], values_SD[is_used_S]
    # Summed over ranks a gradient is dense; its rows are those that any rank used.
    rows_R = gradient.any(1).nonzero()[:, 0]
    return rows_R, gradient[rows_R]
