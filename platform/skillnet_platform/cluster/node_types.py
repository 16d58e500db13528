"""Types of nodes in the file of `ray up`: resources, number, and the GPU of their instances.

``skillnet plan --cluster FILE`` and the checks of a cluster call :func:`list_node_types`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skillnet_platform.cluster.gpu_types import (
    INSTANCE_TYPES,
    GpuType,
    InstanceType,
    find_gpu_type,
)
from skillnet_platform.errors import UserError, first_line


@dataclass(frozen=True)
class NodeType:
    """Nodes that the autoscaler may start.

    Args:
        name: in the file.
        resources: Ray's resources of each node.
        most: largest number of nodes.
        machine: name of the cloud instance; empty if the file names none.
    """

    name: str
    resources: Mapping[str, float] = field(default_factory=dict)
    most: int = 0
    machine: str = ""

    @property
    def instance(self) -> InstanceType | None:
        """The instance, if its data are known."""
        return INSTANCE_TYPES.get(self.machine)

    @property
    def gpus(self) -> int:
        """GPUs of each node that Ray offers."""
        return int(self.resources.get("GPU", 0))

    @property
    def gpu(self) -> GpuType | None:
        """Type of its GPUs; None without GPUs, or for an unknown instance."""
        return find_gpu_type(self.instance.gpu) if self.gpus and self.instance else None


def list_node_types(content: Mapping[str, Any]) -> list[NodeType]:
    """Return the types of the nodes that the autoscaler may start; none of on-premise clusters.

    Args:
        content: parsed YAML of the file of `ray up`.
    """
    if (content.get("provider") or {}).get("type", "local") == "local":
        return []
    return [
        NodeType(
            name,
            kind.get("resources") or {},
            int(kind.get("max_workers", 0)),
            str((kind.get("node_config") or {}).get("InstanceType", "")),
        )
        for name, kind in (content.get("available_node_types") or {}).items()
        if name != content.get("head_node_type")
    ]


def read_node_types(path: Path) -> list[NodeType]:
    """Return the types of nodes in a file of `ray up`.

    Args:
        path: the file.

    Raises:
        UserError: the file is missing, or no such file.
    """
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: cannot be read: {first_line(error)}. Give a file of `ray up`."
        ) from None
    if not isinstance(content, dict) or "provider" not in content:
        raise UserError(f"{path}: it names no provider. Give a file of `ray up`.")
    return list_node_types(content)
