"""Weights without values: the parameters and buffers of a model as fake tensors of a device.

:mod:`skillnet_planning.step_counter` and the tests on fake CUDA tensors call it inside torch's
``FakeTensorMode``, in which ``torch.empty`` allocates nothing.
"""

from typing import Any, TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def replace_weights(model: ModelT, device: torch.device) -> ModelT:
    """Replace all parameters and buffers of a model, in place; shared ones stay shared.

    Args:
        model: on any device, also ``meta``.
        device: device of the new tensors, such as ``cuda:0``.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for owner in (module._parameters, module._buffers):
            for name, tensor in owner.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, tensor.requires_grad)
                    # The original stays alive, so that its id is not given again.
                    made[id(tensor)] = (fake, tensor)
                owner[name] = made[id(tensor)][0]
    return model
