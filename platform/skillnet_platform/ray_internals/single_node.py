"""Start of a Ray that stays on one node and listens on loopback only."""

import contextlib
from collections.abc import Iterator

#: Read by the processes that ``ray.init`` starts.
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@contextlib.contextmanager
def disable_clusters() -> Iterator[None]:
    """Make ``ray.init`` use the address 127.0.0.1, as on macOS and Windows.

    On Linux ``ray.init`` replaces that address by an outer one, and Ray's servers then listen on
    every interface. Set :data:`CLUSTER_VARIABLE` to "0" in the environment of the same block.
    """
    from ray._private import ray_constants

    # Ray reads the variable at import, which may have happened long ago in this process.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
