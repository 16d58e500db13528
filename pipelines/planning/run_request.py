"""Resource requests of commands that train, with the check of their memory.

The ``resources`` hooks of the commands call these functions. ``skillnet plan`` plans the same runs.
"""

from dataclasses import replace

from pipelines.config.growth import GrowConfig
from pipelines.config.resources import request_growth, request_training
from pipelines.config.run import FinetuneConfig
from pipelines.planning.memory_check import MemoryCheck, PlannedRun
from skillnet_platform.cluster.resource_request import ResourceRequest


def request_planned_training(config: FinetuneConfig) -> ResourceRequest:
    """Return the request of a training run, with the check of its memory."""
    check = MemoryCheck(lambda: [PlannedRun(config)])
    return replace(request_training(config), find_memory_problem=check)


def request_planned_growth(config: GrowConfig) -> ResourceRequest:
    """Return the request of ``skillnet grow``; its check reads the model that grows."""

    def list_runs() -> list[PlannedRun]:
        from pipelines.planning.growth_runs import list_growth_runs

        return list_growth_runs(config)

    return replace(request_growth(config), find_memory_problem=MemoryCheck(list_runs))
