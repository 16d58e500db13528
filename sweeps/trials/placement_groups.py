"""What trials leave on the cluster: placement groups hold resources until they are removed."""

import os
import time
from typing import Any

from skillnet_platform import console


def remove_placement_groups(ray: Any, patience_s: float) -> int:
    """Wait until no placement group of this driver is left; remove those that stay. How many.

    Tune removes its own, Ray Train's controllers theirs, some seconds after they end.
    """
    end = time.monotonic() + patience_s
    while left := find_placement_groups(ray):
        if time.monotonic() >= end:
            for identity in left:
                _remove_group(ray, identity)
            console.warn(f"{len(left)} placement groups were left by trials, and removed")
            return len(left)
        time.sleep(0.1)
    return 0


def find_placement_groups(ray: Any) -> list[str]:
    """Ids of the placement groups of this driver that hold or wait for resources."""
    from ray.util.placement_group import placement_group_table
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    here = ray.get_runtime_context()
    try:
        # Without the address it refuses to answer when several Rays run on one machine.
        groups = list_placement_groups(
            address=here.gcs_address,
            filters=[("creator_job_id", "=", here.get_job_id()), ("state", "!=", "REMOVED")],
            limit=1000,
        )
    except RayStateApiException:
        # A Ctrl-C in a terminal also ends the dashboard of an embedded Ray, which is ours alone.
        if os.environ.get("RAY_ADDRESS"):
            console.warn("Ray does not say which placement groups are left: its dashboard is away")
            return []
        table = placement_group_table()
        return [name for name, group in table.items() if group["state"] != "REMOVED"]
    return [group.placement_group_id for group in groups]


def _remove_group(ray: Any, identity: str) -> None:
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(identity))))
