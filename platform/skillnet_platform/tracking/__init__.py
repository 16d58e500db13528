"""MLflow runs, the model registry and the rule of promotion.

:func:`start_run` opens a run. Records wait in a spool on disk while the tracker is unreachable.
"""

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
