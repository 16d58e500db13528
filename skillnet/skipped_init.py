"""Construction of modules without random numbers, for models whose weights come from files.

torch draws the initial weights of every module. A saved model replaces all of them, so the draws
cost time only: some 40 ns a weight. On the meta device torch even imports its compiler to draw
nothing, which takes 2 s of CPU.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
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

#: Skill -> memory of its new weights.
_places: ContextVar[Mapping[str, Callable[[Tensor], Tensor]]] = ContextVar(
    "places of new weights", default=MappingProxyType({})
)
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


@contextlib.contextmanager
def placed_weights(skills: Collection[str], place: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Give weights of some skills another memory as soon as each of them is built.

    Args:
        skills: names of the skills.
        place: returns a tensor of the same shape and type for the weight that it gets.
    """
    token = _places.set({**_places.get(), **dict.fromkeys(skills, place)})
    try:
        yield
    finally:
        _places.reset(token)


def place_weight(skill: str, weight: Tensor) -> Tensor:
    """Return a new weight of a skill in the memory that :func:`placed_weights` gives it.

    Args:
        skill: owner of the weight.
        weight: its initial values.
    """
    place = _places.get().get(skill)
    return weight if place is None else place(weight)


def leave_out(weight: Tensor) -> Tensor:
    """Return zeros of the shape of a weight that take no memory; a file replaces them later.

    Args:
        weight: any tensor.
    """
    return weight.new_zeros(()).expand(weight.shape)
