"""Limit of the weights of a model while it is built from an untrusted configuration.

A configuration of 27 kB can name 3,000 skills and 1,024 layers. Building millions of modules takes
minutes and gigabytes even on torch's meta device, where weights take no memory. The files of a
saved model state how many weights it has, so building stops at one more.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

#: Modules per weight. Those without weights, such as activations, are fewer than the others.
MODULES_PER_WEIGHT = 20
#: Modules that every model may have.
FREE_MODULES = 1000


@contextlib.contextmanager
def limit_weights(weights: int) -> Iterator[None]:
    """Stop building modules inside the block when they have more weights than a saved model.

    Args:
        weights: tensors in the files of the model.

    Raises:
        ValueError: more weights, or an excessive number of modules without weights.
    """
    owner = threading.get_ident()
    built = {"weights": 0, "modules": 0}
    most = {"weights": weights, "modules": FREE_MODULES + MODULES_PER_WEIGHT * weights}

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
