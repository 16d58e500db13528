"""TODO: package skillnet_platform.cluster."""

from skillnet_platform.cluster.connect import (
    OBJECT_STORE_BYTES,
    ensure_ray,
    pin_to_this_node,
    prepare_ray_environment,
    ray_session,
)

__all__ = [
    "OBJECT_STORE_BYTES",
    "ensure_ray",
    "pin_to_this_node",
    "prepare_ray_environment",
    "ray_session",
]
