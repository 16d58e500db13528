"""Configuration of object stores, as used by a run; ``runs.mirror`` applies it."""

from dataclasses import dataclass

from skillnet_platform.config.bounds import NonNegativeAmount, require_bounds
from skillnet_platform.storage.objects import is_uri, require_no_secret


@dataclass
class StorageConfig:
    """Settings of object stores: the mirror of a run.

    Args:
        mirror: URI to which the run's folder is copied, and from which it is restored; null keeps
            it on this machine. ``--run_dir s3://bucket/runs`` sets it.
        patience: seconds that a run waits at its end for a store that does not answer, before it
            lists the missing files and exits with 1.
    """

    mirror: str | None = None
    patience: NonNegativeAmount = 600.0

    def __post_init__(self) -> None:
        if self.mirror is not None and not is_uri(self.mirror):
            raise ValueError(
                f"storage.mirror must be a URI such as s3://bucket/runs, got {self.mirror!r}"
            )
        if self.mirror is not None:
            require_no_secret(self.mirror)
        require_bounds(self, "storage.")
