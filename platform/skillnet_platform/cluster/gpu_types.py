"""Types of GPUs and cloud instances: memory, bandwidth and peak rates from their data sheets.

``skillnet plan`` computes with them, and the checks of a cluster look up the GPUs of nodes that
the autoscaler has not started yet. :func:`find_gpu_type` finds a type by its name.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from skillnet_platform.errors import UserError, first_line, suggest_name

GB = 1e9
#: GPU memory that no tensor of a run gets: the CUDA context, workspaces of cuBLAS and NCCL. An
#: assumption, not a measurement.
RESERVED_BYTES = 1.5 * GB
#: Fraction of the memory that the gaps between blocks of the allocator take. An assumption.
FRAGMENTED_FRACTION = 0.05


@dataclass(frozen=True)
class GpuType:
    """Data sheet of a GPU. Rates are peaks for dense matrices.

    Args:
        name: short name, such as ``L4``.
        memory_gb: memory in GB (1e9 bytes).
        bandwidth_gb_s: memory bandwidth in GB/s.
        bf16_tflops: rate of bf16 products in TFLOP/s; 0 if the GPU has none in hardware.
        fp32_tflops: rate of fp32 products without TF32, in TFLOP/s.
        link_gb_s: bandwidth to the other GPUs of its node in GB/s, in one direction: NVLink, or
            PCIe 4 with 16 lanes. The data sheets state the sum of both directions.
    """

    name: str
    memory_gb: float
    bandwidth_gb_s: float
    bf16_tflops: float
    fp32_tflops: float
    link_gb_s: float = 32

    @property
    def has_bf16(self) -> bool:
        """Return whether ``training.precision auto`` takes bf16 on this GPU."""
        return self.bf16_tflops > 0

    @property
    def usable_bytes(self) -> float:
        """Bytes for the tensors of a run."""
        return self.memory_gb * GB * (1 - FRAGMENTED_FRACTION) - RESERVED_BYTES

    def describe(self) -> str:
        """Return name and memory: ``L4 (24 GB)``."""
        return f"{self.name} ({self.memory_gb:g} GB)"


#: Dense rates: where a data sheet states rates "with sparsity", half of them.
GPU_TYPES = {
    each.name: each
    for each in (
        # "NVIDIA T4 Tensor Core GPU" data sheet: PCIe 3; Turing has no bf16 products.
        GpuType("T4", 16, 320, 0, 8.1, 16),
        # "NVIDIA V100 Tensor Core GPU" data sheet, SXM2; Volta has no bf16 products.
        GpuType("V100-16", 16, 900, 0, 15.7, 150),
        GpuType("V100-32", 32, 900, 0, 15.7, 150),
        # "NVIDIA A10 Tensor Core GPU" data sheet.
        GpuType("A10", 24, 600, 125, 31.2),
        # "NVIDIA A10G" data sheet of the AWS G5 instances: 70 TFLOP/s, 140 with sparsity.
        GpuType("A10G", 24, 600, 70, 35),
        # "NVIDIA L4 Tensor Core GPU" data sheet: 242 TFLOP/s with sparsity.
        GpuType("L4", 24, 300, 121, 30.3),
        # "NVIDIA L40S" data sheet: 362 TFLOP/s, 733 with sparsity.
        GpuType("L40S", 48, 864, 362, 91.6),
        # "NVIDIA A100 Tensor Core GPU" data sheet, SXM.
        GpuType("A100-40", 40, 1555, 312, 19.5, 300),
        GpuType("A100-80", 80, 2039, 312, 19.5, 300),
        # "NVIDIA H100 Tensor Core GPU" data sheet, SXM: 1,979 TFLOP/s with sparsity.
        GpuType("H100", 80, 3350, 989, 67, 450),
        # "NVIDIA H200 Tensor Core GPU" data sheet, SXM: 1,979 TFLOP/s with sparsity.
        GpuType("H200", 141, 4800, 989, 67, 450),
    )
}


@dataclass(frozen=True)
class InstanceType:
    """GPUs and network of a cloud instance.

    Args:
        gpu: name of its GPU in :data:`GPU_TYPES`.
        gpus: number of its GPUs.
        cpus: number of its virtual CPUs.
        network_gbit_s: network bandwidth in Gbit/s; the peak where the vendor says "up to".
    """

    gpu: str
    gpus: int
    cpus: int
    network_gbit_s: float


#: Source: the pages "Amazon EC2 G4, G5, G6, G6e, P3, P4 and P5 instances".
INSTANCE_TYPES = {
    "g4dn.xlarge": InstanceType("T4", 1, 4, 25),
    "g4dn.2xlarge": InstanceType("T4", 1, 8, 25),
    "g4dn.12xlarge": InstanceType("T4", 4, 48, 50),
    "p3.2xlarge": InstanceType("V100-16", 1, 8, 10),
    "p3.8xlarge": InstanceType("V100-16", 4, 32, 10),
    "p3.16xlarge": InstanceType("V100-16", 8, 64, 25),
    "p3dn.24xlarge": InstanceType("V100-32", 8, 96, 100),
    "g5.xlarge": InstanceType("A10G", 1, 4, 10),
    "g5.2xlarge": InstanceType("A10G", 1, 8, 10),
    "g5.4xlarge": InstanceType("A10G", 1, 16, 25),
    "g5.12xlarge": InstanceType("A10G", 4, 48, 40),
    "g5.48xlarge": InstanceType("A10G", 8, 192, 100),
    "g6.xlarge": InstanceType("L4", 1, 4, 10),
    "g6.2xlarge": InstanceType("L4", 1, 8, 10),
    "g6.4xlarge": InstanceType("L4", 1, 16, 25),
    "g6.12xlarge": InstanceType("L4", 4, 48, 40),
    "g6.48xlarge": InstanceType("L4", 8, 192, 100),
    "g6e.2xlarge": InstanceType("L40S", 1, 8, 20),
    "g6e.12xlarge": InstanceType("L40S", 4, 48, 100),
    "g6e.48xlarge": InstanceType("L40S", 8, 192, 400),
    "p4d.24xlarge": InstanceType("A100-40", 8, 96, 400),
    "p4de.24xlarge": InstanceType("A100-80", 8, 96, 400),
    "p5.48xlarge": InstanceType("H100", 8, 192, 3200),
    "p5e.48xlarge": InstanceType("H200", 8, 192, 3200),
}


#: Node of GPUs that no instance above has. An assumption.
OTHER_NODE = InstanceType("", 8, 0, 10)


def find_gpu_type(name: str) -> GpuType:
    """Return the type of a short name, in any case.

    Raises:
        UserError: an unknown type.
    """
    known = {each.upper(): each for each in GPU_TYPES}
    wanted = {"A100": "A100-80", "V100": "V100-32"}.get(name.upper(), name.upper())
    if wanted not in known:
        raise UserError(
            f"{name}: unknown type of GPU{suggest_name(wanted, known)}. Choose one of "
            f"{', '.join(GPU_TYPES)}."
        )
    return GPU_TYPES[known[wanted]]


def describe_device(name: str, total_bytes: int, capability: tuple[int, int]) -> GpuType:
    """Return the type of a device that torch has found, with the memory that torch sees.

    Args:
        name: identifier of the device, such as ``NVIDIA L4``.
        total_bytes: its memory.
        capability: its compute capability; bf16 needs 8.0.
    """
    words = re.findall(r"[A-Z]+[0-9]+[A-Z]*", name.upper())
    fits = [each for each in GPU_TYPES.values() if each.name.partition("-")[0] in words]
    sheet = min(fits, key=lambda each: abs(each.memory_gb * GB - total_bytes), default=None)
    rates = (
        (sheet.bandwidth_gb_s, sheet.bf16_tflops, sheet.fp32_tflops)
        if sheet is not None
        else (0.0, float(capability >= (8, 0)), 0.0)
    )
    return GpuType(sheet.name if sheet is not None else name, round(total_bytes / GB, 1), *rates)


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
