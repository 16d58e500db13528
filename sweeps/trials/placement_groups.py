"""Remove leftover placement groups of trials, which would keep resources reserved."""

import os
import time
from typing import Any

from skillnet_platform import console


def remove_placement_groups(ray: Any, patience_s: float) -> int:
    """Wait until this driver has no placement groups, then remove the remaining ones.

    Tune and Ray Train remove their own groups, but some seconds after they end.

    Args:
        ray: the connected ``ray`` module.
        patience_s: seconds to wait.

    Returns:
        Number of groups that were removed.
    """
    end = time.monotonic() + patience_s
    while left := find_placement_groups(ray):
        if time.monotonic() >= end:
            for identity in left:
                _remove_group(ray, identity)
            console.print_warning(f"removed {len(left)} placement groups that trials had left")
            return len(left)
        time.sleep(0.1)
    return 0


def find_placement_groups(ray: Any) -> list[str]:
    """Return the ids of this driver's placement groups that hold or wait for resources."""
    from ray.util.placement_group import placement_group_table
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    here = ray.get_runtime_context()
    try:
        # Without an address the call fails if several Ray clusters run on one machine.
        groups = list_placement_groups(
            address=here.gcs_address,
            filters=[("creator_job_id", "=", here.get_job_id()), ("state", "!=", "REMOVED")],
            limit=1000,
        )
    except RayStateApiException:
        # Ctrl-C in a terminal also ends the dashboard of an embedded Ray, which only we use.
        if os.environ.get("RAY_ADDRESS"):
            console.print_warning(
                "cannot check for leftover placement groups: Ray's dashboard is down"
            )
            return []
        table = placement_group_table()
        return [name for name, group in table.items() if group["state"] != "REMOVED"]
    return [group.placement_group_id for group in groups]


def _remove_group(ray: Any, identity: str) -> None:
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
