"""Resource request of a training run, with the check of its memory.

The ``resources`` hooks of the training commands call :func:`request_planned_training`.
"""

from dataclasses import replace

from pipelines.config.resources import request_training
from pipelines.config.run import FinetuneConfig
from skillnet_platform.cluster.gpu_types import GpuType
from skillnet_platform.cluster.resource_request import ResourceRequest


def request_planned_training(config: FinetuneConfig) -> ResourceRequest:
    """Return the request of a training run; with GPUs it also computes the memory of a worker."""
    request = request_training(config)
    if not config.training.use_gpu:
        return request

    def find_problem(gpu: GpuType) -> tuple[str, str] | None:
        # Imported here, because the import of torch takes seconds.
        from pipelines.planning.memory_plan import find_memory_problem

        return find_memory_problem(config, gpu)

    return replace(request, find_memory_problem=find_problem)
