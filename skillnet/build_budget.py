"""Limit of the weights of a model while it is built from an untrusted configuration.

A configuration of 27 kB can name 3,000 skills and 1,024 layers. Building millions of modules takes
minutes and gigabytes even on torch's meta device, where weights take no memory. The headers of a
saved model's files name all of its weights, so building stops when it exceeds them. Only names of
files that the model can have count, and only those with data: a name alone costs nothing.
"""

import contextlib
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from skillnet.serialization import read_tensor_shapes

#: Registrations per weight: a module that replaces another one registers the same weights again.
REGISTRATIONS_PER_WEIGHT = 4
#: Modules per weight. Those without weights, such as activations, are fewer than the others.
MODULES_PER_WEIGHT = 8
#: Registrations that every model may have.
FREE_REGISTRATIONS = 1000


def count_saved_weights(files: Iterable[Path]) -> int:
    """Return the number of weights with data in safetensors files.

    Args:
        files: paths. A file that is missing or damaged counts as empty: who needs it reports it.
    """
    total = 0
    for file in files:
        if file.is_file():
            with contextlib.suppress(ValueError):
                total += sum(0 not in shape for shape in read_tensor_shapes(file).values())
    return total


@contextlib.contextmanager
def limit_weights(weights: int) -> Iterator[None]:
    """Stop building modules inside the block when they have more weights than a saved model.

    Args:
        weights: number of elements of the saved model; see :func:`count_saved_weights`.

    Raises:
        ValueError: more weights, or an excessive number of modules without weights.
    """
    owner = threading.get_ident()
    built = {"weights": 0, "modules": 0}
    most = {
        "weights": FREE_REGISTRATIONS + REGISTRATIONS_PER_WEIGHT * weights,
        "modules": FREE_REGISTRATIONS + MODULES_PER_WEIGHT * weights,
    }

    def count(kind: str) -> None:
        # The hooks are global: other threads may build models of their own.
        if threading.get_ident() != owner:
            return
        built[kind] += 1
        if built[kind] > most[kind]:
            raise ValueError(f"it describes more than the {weights} weights of its files")

    def on_weight(module: nn.Module, name: str, weight: Any) -> None:
        if weight is not None:
            count("weights")

    def on_module(module: nn.Module, name: str, child: Any) -> None:
        count("modules")

    hooks = [
        register_module_parameter_registration_hook(on_weight),
        register_module_module_registration_hook(on_module),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
