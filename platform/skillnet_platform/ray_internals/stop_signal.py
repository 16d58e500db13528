"""Stop signal that every process of a cluster sees, in the key-value store of Ray's head."""

import contextlib
import secrets

from ray.exceptions import RaySystemError
from ray.experimental import internal_kv

NAMESPACE = "skillnet-notice"


class RayStopSignal:
    """Key in the store of Ray's head by which a driver asks its workers to stop.

    Each signal has its own key: workers that outlive a killed driver ignore the next driver's
    signal. A check is one small message to the head.
    """

    def __init__(self) -> None:
        self._key = secrets.token_hex(8)

    def set(self) -> None:
        """Write the key."""
        internal_kv._internal_kv_put(self._key, "leave", namespace=NAMESPACE)

    def clear(self) -> None:
        """Delete the key. A head that is gone took the key along."""
        with contextlib.suppress(RaySystemError, AttributeError):
            internal_kv._internal_kv_del(self._key, namespace=NAMESPACE)

    def is_set(self) -> bool:
        """Return whether the key exists."""
        return bool(internal_kv._internal_kv_exists(self._key, namespace=NAMESPACE))
