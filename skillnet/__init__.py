"""SkillNet: one Transformer whose parameters are split into skills, activated per task.

The public names load on first use, so importing a configuration does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skillnet.config import SkillNetConfig
    from skillnet.model import SkillNet
    from skillnet.skills import SkillPlan, Task

__all__ = ["SkillNet", "SkillNetConfig", "SkillPlan", "Task"]

_HOME = {
    "SkillNet": "skillnet.model",
    "SkillNetConfig": "skillnet.config",
    "SkillPlan": "skillnet.skills",
    "Task": "skillnet.skills",
}


# PEP 562: a module-level __getattr__ keeps `skillnet --help` free of torch.
def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'skillnet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
