"""TODO: package skillnet_platform.tracking."""

from skillnet_platform.tracking.run import (
    LONGEST_PARAMETER,
    LONGEST_TAG,
    Tracker,
    TrackingConfig,
    child,
    recorded,
    send_left_behind,
    start,
)

__all__ = [
    "LONGEST_PARAMETER",
    "LONGEST_TAG",
    "Tracker",
    "TrackingConfig",
    "child",
    "recorded",
    "send_left_behind",
    "start",
]
