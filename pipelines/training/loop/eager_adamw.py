"""AdamW that does not import torch's compiler.

torch imports its compiler with all code generators when the first optimizer is built, and again
asks for it at each step: more than a second of CPU time in each process that trains. It needs the
import only to exclude the optimizer from compilation, and here no compiled function contains one.
"""

import inspect
import sys
from typing import Any

import torch

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

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update all parameters that have a gradient; see :meth:`torch.optim.AdamW.step`."""
        return inspect.unwrap(torch.optim.AdamW.step)(self, closure)
