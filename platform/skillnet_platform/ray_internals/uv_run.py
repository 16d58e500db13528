"""Setting by which workers keep the driver's interpreter under ``uv run``.

Ray 2.47 and later detects ``uv run`` as the driver's parent. It then uploads the working directory
and starts every worker through ``uv run``, which may install other versions or fail.
"""

import os

UV_RUN_VARIABLE = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"


def apply_uv_run_setting() -> None:
    """Apply ``RAY_ENABLE_UV_RUN_RUNTIME_ENV`` in a process that imported Ray before it was set.

    Ray reads the variable at import.
    """
    from ray._private import ray_constants

    if os.environ.get(UV_RUN_VARIABLE) == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False
