"""Configuration of object stores, as used by a run; ``runs.mirror`` applies it."""

from dataclasses import dataclass

from skillnet_platform.config import fixed_field
from skillnet_platform.storage.objects import is_uri, require_no_secret


@dataclass
class StorageConfig:
    """Settings of object stores: the mirror of a run.

    Args:
        mirror: URI to which the run's folder is copied, and from which it is restored; null keeps
            it on this machine. A ``run_dir`` that is a URI sets it.
    """

    mirror: str | None = fixed_field(None)

    def __post_init__(self) -> None:
        if self.mirror is not None and not is_uri(self.mirror):
            raise ValueError(
                f"storage.mirror must be a URI such as s3://bucket/runs, got {self.mirror!r}"
            )
        if self.mirror is not None:
            require_no_secret(self.mirror)
