"""Exceptions that end the worker group of an elastic run. They import no Ray."""


class WorkerGroupResize(Exception):
    """Request of a worker to restart its group, raised after a checkpoint.

    Args:
        leaving: ids of the nodes whose workers were asked to stop. They get no worker.
    """

    def __init__(self, leaving: list[str]) -> None:
        super().__init__(leaving)
        self.leaving = leaving

    def __str__(self) -> str:
        nodes = f" without {len(self.leaving)} node(s) that leave" if self.leaving else ""
        return f"the workers restart{nodes}"


class InsufficientWorkersError(Exception):
    """Too few nodes for an elastic run when its driver was asked to stop."""
