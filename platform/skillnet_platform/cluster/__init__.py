"""Ray sessions, jobs of a cluster, and what nodes need.

:func:`ray_session` connects to the cluster of ``RAY_ADDRESS``, or starts Ray on this machine.
"""

from skillnet_platform.cluster.connect import (
    ensure_ray,
    halt_if_asked,
    pin_to_this_node,
    prepare_ray_environment,
    ray_session,
)
