"""AdamW over all parameters of a model, the learning rate of each step, and a weight average.

A step computes gradients only for the parameters of its task. ``torch.optim.AdamW`` skips a
parameter without a gradient: it gets no update, no weight decay and no optimizer state, and its
step count, which corrects the bias of the averages, stays as it is.
"""

import inspect
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from pipelines.training.config.run import TrainingConfig
from skillnet.skill_weights import find_weight_skill

#: Attribute in which torch keeps the excluded variant of a function, for all later calls.
_EXCLUDED = "__dynamo_disable"


class EagerAdamW(torch.optim.AdamW):
    """``torch.optim.AdamW`` without the import of torch's compiler.

    A version of torch that keeps excluded functions elsewhere imports the compiler as before.

    Args:
        args, options: see :class:`torch.optim.AdamW`.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        if "torch._dynamo" not in sys.modules:
            for method in vars(torch.optim.Optimizer).values():
                wrapped = getattr(method, "__wrapped__", None)
                if wrapped is not None:
                    setattr(wrapped, _EXCLUDED, wrapped)
        super().__init__(*args, **options)
        self._group_of: dict[nn.Parameter, int] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; see :meth:`torch.optim.AdamW.step`."""
        loss = inspect.unwrap(torch.optim.AdamW.step)(self, closure)
        # torch's fused update does not count its changes, on which caches and checkpoints rely.
        groups = (group["params"] for group in self.param_groups)
        increment_version([p for params in groups for p in params if p.grad is not None])
        return loss

    def step_some(self, parameters: Iterable[nn.Parameter]) -> None:
        """Update some parameters, without a look at all others.

        Args:
            parameters: weights of this optimizer; those with a gradient are updated.
        """
        if not self._group_of:
            numbered = enumerate(self.param_groups)
            self._group_of = {p: number for number, group in numbered for p in group["params"]}
        chosen: list[list[nn.Parameter]] = [[] for _ in self.param_groups]
        for parameter in parameters:
            chosen[self._group_of[parameter]].append(parameter)
        complete = [group["params"] for group in self.param_groups]
        for group, some in zip(self.param_groups, chosen, strict=True):
            group["params"] = some
        try:
            self.step()
        finally:
            for group, everything in zip(self.param_groups, complete, strict=True):
                group["params"] = everything


NamedParameters = Sequence[tuple[str, nn.Parameter]]

#: Decays of AdamW's averages of gradients and of squared gradients.
BETAS = (0.9, 0.98)
#: Learning rate of the last step, as a fraction of the peak.
LAST_RATE = 0.02
#: Fraction of the steps in which the schedule ``wsd`` decays.
WSD_DECAY_FRACTION = 0.3


class WeightOwner(Protocol):
    """A model, or this rank's shards of one."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Return names and weights."""


#: Names of position vectors and class tokens in timm and transformers.
_OF_LIBRARIES = ("pos_embed", "cls_token", "distillation_token")


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies: only to weight matrices, not to embeddings."""
    # Names such as ``layers.0.attention.qkv.weight.weights.text``.
    kept = name.split(".")
    if find_weight_skill(name) is not None:
        kept = kept[:-1]  # a skill may be called anything
    if "patch_embeddings" in kept:  # transformers' name for the projection of patches
        kept = kept[kept.index("patch_embeddings") + 1 :]
    skip = ("embedding", "bigram", "norm", "bias", "position", "modality", *_OF_LIBRARIES)
    return parameter.ndim >= 2 and not any(word in part for part in kept for word in skip)


def compute_learning_rate(config: TrainingConfig, step: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: schedule.
        step: steps done before; 0 for the first step.
    """
    warmup = config.warmup_fraction * config.steps
    if step < warmup:
        return config.lr * (step + 1) / max(warmup, 1.0)
    if config.schedule == "constant":
        return config.lr
    # Decay begins after the warmup; with ``wsd`` after the constant phase.
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, config.steps * (1 - WSD_DECAY_FRACTION))
        if step < start:
            return config.lr
    done = min((step - start) / max(config.steps - start, 1.0), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (LAST_RATE + (1 - LAST_RATE) * fall)


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: TrainingConfig
) -> EagerAdamW:
    """Build AdamW (Loshchilov & Hutter 2019) in two groups: with and without weight decay.

    Args:
        parameters: names and tensors of the model.
        config: learning rate and weight decay.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in parameters:
        groups[has_weight_decay(name, parameter)].append(parameter)
    by_decay: list[dict[str, Any]] = [
        {"params": groups[True], "weight_decay": config.weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]
    return EagerAdamW(by_decay, lr=config.lr, betas=BETAS, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, config: TrainingConfig, step: int) -> float:
    """Set the learning rate of a step, :func:`compute_learning_rate`, and return it.

    Args:
        optimizer: AdamW over all parameters; those outside of the step's task have no gradient.
        config: schedule of the step's task.
        step: steps done before.
    """
    rate = compute_learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    shards: dist.ProcessGroup | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """Scale gradients to a global norm of at most ``max_norm``; 0 does not scale.

    Args:
        parameters: with gradients.
        max_norm: largest norm.
        shards: ranks that each have a part of every gradient; None if each has the whole.
        norm: length of the gradients of all ranks, if it is known.

    Returns:
        The norm before scaling.
    """
    limit, parameters = max_norm or math.inf, list(parameters)
    # foreach: one call for all tensors; torch chooses it by itself only on GPUs.
    if shards is None and norm is None:
        return nn.utils.clip_grad_norm_(parameters, limit, foreach=True)
    if norm is None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        square = nn.utils.get_total_norm(gradients, foreach=True).square()
        dist.all_reduce(square, group=shards)
        norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(parameters, limit, norm, foreach=True)
    return norm


def update_weights(
    optimizer: EagerAdamW,
    active: NamedParameters,
    max_norm: float,
    average: "WeightAverage | None" = None,
    shards: dist.ProcessGroup | None = None,
    norm: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip the gradients, update the weights unless a gradient is not finite, drop the gradients.

    The time depends on the parameters of the step alone, not on those of the model.

    The device decides, so the host does not wait for the backward pass. Without an update, weights
    and optimizer state keep their values; a weight without state gets that of zero updates.

    Args:
        optimizer: over these parameters and others, fused.
        active: parameters of the step.
        max_norm: see :func:`clip_gradients`.
        average: running mean of the weights, or None.
        shards: see :func:`clip_gradients`.
        norm: see :func:`clip_gradients`.

    Returns:
        The norm of the gradient before scaling, and whether it is finite, both on the device.
    """
    norm = clip_gradients((parameter for _, parameter in active), max_norm, shards, norm)
    is_finite = torch.isfinite(norm)
    # torch's GradScaler hands its flag to fused optimizers in the same attribute.
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    parameters = [parameter for _, parameter in active]
    optimizer.step_some(parameters)
    if average is not None:
        average.update(active)
    # A later step of another task must not find them.
    for parameter in parameters:
        parameter.grad = None
    return norm, is_finite


class BestWeights:
    """Copy of the trained weights at the best validation, and the number of worse ones since.

    Args:
        patience: validations without a better score after which training ends.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self.values: dict[str, Tensor] = {}
        self.score, self.step, self.misses = -math.inf, 0, 0

    @property
    def is_over(self) -> bool:
        """Whether training ends."""
        return self.misses >= self._patience

    def describe_end(self) -> str:
        """Return in words why training ended."""
        return (
            f"no better validation in {self.misses} since step {self.step}, whose weights the "
            "model has (training.patience)"
        )

    @torch.no_grad()
    def add_validation(self, weights: Mapping[str, Tensor], score: float, step: int) -> None:
        """Copy the weights if their score is the best so far.

        Args:
            weights: those that the training changes, as they were validated.
            score: higher is better; NaN is never better.
            step: steps done.
        """
        if not score > self.score:
            self.misses += 1
            return
        self.score, self.step, self.misses = score, step, 0
        self.values = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor]) -> None:
        """Give the weights the best values; without a score they stay.

        Args:
            weights: see :meth:`add_validation`.
        """
        for name, value in self.values.items():
            weights[name].copy_(value)

    def to_dict(self) -> dict[str, Any]:
        """Return the state without the weights, for ``state.json``."""
        score = self.score if self.values else None
        return {"score": score, "step": self.step, "misses": self.misses}

    def load_dict(self, state: Any) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: it is none.
        """
        known = isinstance(state, dict) and all(
            type(state.get(key)) is int for key in ("step", "misses")
        )
        if not known or not isinstance(state.get("score"), float | int | None):
            raise ValueError("best has no score, step and misses")
        score = state["score"]
        self.score = -math.inf if score is None else float(score)
        self.step, self.misses = state["step"], state["misses"]


class WeightAverage:
    """Exponential average of the weights, updated only for the active parameters of a step.

    A step without an update of the weights, because its gradient is not finite, counts too: the
    host does not know of it at that time.

    At first the decay is smaller, (1 + n) / (10 + n) after n updates of a parameter, so that the
    random initial weights are soon forgotten.

    Args:
        decay: per update.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.values: dict[str, Tensor] = {}
        self.updates: dict[str, int] = {}

    @torch.no_grad()
    def update(self, active: NamedParameters) -> None:
        """Move the averages of the active parameters towards them."""
        by_rate: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for name, parameter in active:
            if name not in self.values:
                self.values[name], self.updates[name] = parameter.detach().clone(), 0
            count = self.updates[name] = self.updates[name] + 1
            # Parameters with the same number of updates share one fused call.
            rate = 1 - min(self._decay, (1 + count) / (10 + count))
            averages, weights = by_rate.setdefault(rate, ([], []))
            averages.append(self.values[name])
            weights.append(parameter)
        for rate, (averages, weights) in by_rate.items():
            torch._foreach_lerp_(averages, weights, rate)

    @torch.no_grad()
    def swap(self, model: WeightOwner) -> None:
        """Exchange the model's weights with their averages; call again to undo."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                current = parameter.detach().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(current)
