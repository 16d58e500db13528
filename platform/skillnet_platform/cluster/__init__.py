"""TODO: package skillnet_platform.cluster."""

from skillnet_platform.cluster.connect import (
    OBJECT_STORE_BYTES,
    ensure_ray,
    on_this_host,
    prepare_environment,
    session,
)

__all__ = ["OBJECT_STORE_BYTES", "ensure_ray", "on_this_host", "prepare_environment", "session"]
