"""Construction of modules without random numbers, for models whose weights come from files.

torch draws the initial weights of every module. A saved model replaces all of them, so the draws
cost time only: some 40 ns a weight. On the meta device torch even imports its compiler to draw
nothing, which takes 2 s of CPU.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
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


class SkippedInit(TorchFunctionMode):
    """Context in which random initial weights become zeros, and no random number is drawn.

        with SkippedInit():
            model = SkillNet(config)

    Buffers and constant weights, such as the scales of a norm, keep their values.
    """

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
            types: of its tensors.
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
