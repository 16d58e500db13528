"""AdamW over the active parameters of a step, and the learning rate's way.

``torch.optim.AdamW`` walks all parameters each step to find those with gradients. Here a step
names its parameters, so its time and its state do not grow with skills that are never used.
An inactive parameter gets no update, no weight decay and no state.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from pipelines.config.run import TrainingConfig

Named = Sequence[tuple[str, nn.Parameter]]

#: What timm and transformers call position vectors and class tokens.
_OF_LIBRARIES = ("pos_embed", "cls_token", "distillation_token")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: weight matrices only; no biases, norms or embeddings."""
    parts = name.split(".")
    kept = parts[:-1] if "weights" in parts[-2:-1] else parts  # a skill may be called anything
    if "patch_embeddings" in kept:  # transformers' name for the projection of patches
        kept = kept[kept.index("patch_embeddings") + 1 :]
    skip = ("embedding", "bigram", "norm", "bias", "position", "modality", *_OF_LIBRARIES)
    return parameter.ndim >= 2 and not any(word in part for part in kept for word in skip)


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Learning rate of a step (0 is the first)."""
    warmup = config.warmup if config.warmup >= 1 else config.warmup * config.steps
    if step < warmup:
        return config.lr * (step + 1) / max(warmup, 1.0)
    if config.schedule == "constant":
        return config.lr
    start = warmup
    if config.schedule == "wsd":
        start = max(warmup, config.steps * (1 - config.decay))
        if step < start:
            return config.lr
    done = min((step - start) / max(config.steps - start, 1.0), 1.0)
    fall = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.final_lr + (1 - config.final_lr) * fall)


class SkillAdamW:
    """AdamW with decoupled weight decay (Loshchilov & Hutter 2019) on named parameters.

    Each parameter counts its own updates, so bias correction is right for skills that join
    late. Kernels are torch's fused ones.

    Args:
        weight_decay: on weight matrices, see ``decays``.
        betas: decay of the averages of gradient and squared gradient.
        eps: added to the root of the squared average.
    """

    #: What it keeps of a parameter.
    FIELDS = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self, weight_decay: float, betas: tuple[float, float] = (0.9, 0.98), eps: float = 1e-8
    ) -> None:
        self._weight_decay, self._betas, self._eps = weight_decay, betas, eps
        self.state: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, active: Named, lr: float) -> None:
        """Update the active parameters that have a gradient."""
        for with_decay in (True, False):
            names = [
                (name, parameter)
                for name, parameter in active
                if parameter.grad is not None and decays(name, parameter) == with_decay
            ]
            if not names:
                continue
            states = [self._state(name, parameter) for name, parameter in names]
            adamw(
                [parameter for _, parameter in names],
                [parameter.grad for _, parameter in names],  # type: ignore[misc]
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                fused=True,
                amsgrad=False,
                beta1=self._betas[0],
                beta2=self._betas[1],
                lr=lr,
                weight_decay=self._weight_decay if with_decay else 0.0,
                eps=self._eps,
                maximize=False,
            )

    def _state(self, name: str, parameter: Tensor) -> dict[str, Tensor]:
        if name not in self.state:
            self.state[name] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[name]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """State of the named parameters, keys ``<parameter>/<exp_avg|exp_avg_sq|step>``."""
        return {
            f"{name}/{key}": value
            for name in names
            if name in self.state
            for key, value in self.state[name].items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over state written by ``tensors``."""
        for key, value in tensors.items():
            name, _, field = key.rpartition("/")
            self.state.setdefault(name, {})[field] = value.clone()


def clip_by_norm(active: Named, largest: float) -> Tensor:
    """Scale the active gradients to a global norm of at most ``largest``; returns the norm."""
    grads = [parameter.grad for _, parameter in active if parameter.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    if largest > 0:
        torch._foreach_mul_(grads, torch.clamp(largest / (norm + 1e-6), max=1.0))
    return norm


class WeightAverage:
    """Exponential average of the weights, advanced only where a step was active.

    Early on the decay is smaller, (1 + n) / (10 + n) after n updates of a parameter, so that
    the first random weights are soon forgotten.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self.values: dict[str, Tensor] = {}
        self.updates: dict[str, int] = {}

    @torch.no_grad()
    def update(self, active: Named) -> None:
        """Move the averages of the active parameters towards them."""
        by_rate: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
        for name, parameter in active:
            if name not in self.values:
                self.values[name], self.updates[name] = parameter.detach().clone(), 0
            count = self.updates[name] = self.updates[name] + 1
            rate = 1 - min(self._decay, (1 + count) / (10 + count))
            averages, weights = by_rate.setdefault(rate, ([], []))
            averages.append(self.values[name])
            weights.append(parameter)
        for rate, (averages, weights) in by_rate.items():
            torch._foreach_lerp_(averages, weights, rate)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights with their averages; call again to undo."""
        for name, parameter in model.named_parameters():
            if name in self.values:
                kept = parameter.detach().clone()
                parameter.copy_(self.values[name])
                self.values[name].copy_(kept)
