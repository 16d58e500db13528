"""Check that the node of this process still belongs to the cluster.

A driver survives the end of its node's raylet, and Ray Tune then waits for its trials for ever.
"""

import time

from skillnet_platform.errors import UserError

#: Seconds between two questions to Ray's head.
INTERVAL_S = 5.0


class OwnNodeCheck:
    """Asks Ray's head from time to time whether the node of this process is alive."""

    def __init__(self) -> None:
        self._next = time.monotonic() + INTERVAL_S

    def require_alive(self) -> None:
        """Raise an error if the node is lost; at most one question in :data:`INTERVAL_S`.

        Raises:
            UserError: Ray's head counts the node as dead.
        """
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + INTERVAL_S
        import ray

        own = ray.get_runtime_context().get_node_id()
        if any(node["NodeID"] == own and not node["Alive"] for node in ray.nodes()):
            raise UserError(
                "Ray lost the node of this command: its raylet ended, so nothing more can run on "
                "it. Run the same command again; finished parts are kept"
            )
