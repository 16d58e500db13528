"""TODO: package skillnet_platform.tracking."""

from skillnet_platform.tracking.run import (
    LONGEST_PARAMETER,
    LONGEST_TAG,
    Tracker,
    TrackingConfig,
    read_run_id,
    send_leftover_spools,
    start_child_run,
    start_run,
)

__all__ = [
    "LONGEST_PARAMETER",
    "LONGEST_TAG",
    "Tracker",
    "TrackingConfig",
    "read_run_id",
    "send_leftover_spools",
    "start_child_run",
    "start_run",
]
