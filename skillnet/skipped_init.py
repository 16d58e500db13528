"""Construction of modules without random numbers, for models whose weights come from files.

torch draws the initial weights of every module. A saved model replaces all of them, so the draws
cost time only: some 40 ns a weight. On the meta device torch even imports its compiler to draw
nothing, which takes 2 s of CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

#: Fills with random numbers, by name, because transformers replaces functions of ``torch.nn.init``.
#: A mode sees the outermost function only, thus also those of ``init``.
RANDOM_FILLS = frozenset(
    {
        "normal_",
        "uniform_",
        "trunc_normal_",
        "kaiming_normal_",
        "kaiming_uniform_",
        "xavier_normal_",
        "xavier_uniform_",
    }
)
#: Constructors of random tensors.
RANDOM_TENSORS: frozenset[Callable[..., Any]] = frozenset({torch.randn, torch.rand})

#: Number of contexts that are open.
_open_contexts: ContextVar[int] = ContextVar("open contexts of SkippedInit", default=0)


class SkippedInit(TorchFunctionMode):
    """Context in which random initial weights become zeros, and no random number is drawn.

        with SkippedInit():
            model = SkillNet(config)

    Buffers and constant weights, such as the scales of a norm, keep their values.
    """

    def __enter__(self) -> "SkippedInit":
        _open_contexts.set(_open_contexts.get() + 1)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _open_contexts.set(_open_contexts.get() - 1)
        super().__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Replace a random fill by zeros; call any other function.

        Args:
            func: function of torch.
            types: classes of its tensors.
            args: its arguments.
            kwargs: its keyword arguments.
        """
        options = dict(kwargs or {})
        if getattr(func, "__name__", "") in RANDOM_FILLS:
            tensor: Tensor = args[0] if args else options["tensor"]
            if not tensor.is_meta:
                tensor.detach().zero_()  # a weight requires a gradient
            return tensor
        if func in RANDOM_TENSORS:
            options.pop("generator", None)
            return torch.zeros(*args, **options)
        return func(*args, **options)


def draw_truncated_normal(weight: Tensor, std: float, mean: float = 0.0) -> None:
    """Fill a weight from a normal distribution within three standard deviations; in place.

    A mode does not see torch's function as a whole: after a skipped draw, its search for values
    outside of the bounds would take a quarter of the time to load a model.

    Args:
        weight: tensor of any shape.
        std: standard deviation before the truncation.
        mean: center before the truncation.
    """
    if _open_contexts.get():
        if not weight.is_meta:
            weight.detach().zero_()
    else:
        nn.init.trunc_normal_(weight, mean, std, a=mean - 3 * std, b=mean + 3 * std)
