"""In-memory store whose reads fail on request."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem


class _Flaky:
    """File whose reads beyond ``place`` fail a given number of times."""

    def __init__(self, inner: Any, faults: dict[str, int], place: int) -> None:
        self._inner, self._faults, self._place, self._at = inner, faults, place, 0
        self.size = inner.size

    def read(self, size: int = -1) -> bytes:
        if self._at + size > self._place and self._faults["left"]:
            self._faults["left"] -= 1
            raise ConnectionError("the store hung up")
        self._inner.seek(self._at)
        data: bytes = self._inner.read(min(size, 1000))
        self._at += len(data)
        return data

    def seek(self, at: int) -> int:
        self._at = at
        return at

    def tell(self) -> int:
        return self._at

    def close(self) -> None: ...


@contextmanager
def reads_fail(times: int, place: int, name: str = "") -> Iterator[dict[str, int]]:
    """Have reads of files whose names end so fail: ``times`` of those that go beyond ``place``."""
    faults, opened = {"left": times}, MemoryFileSystem._open

    def flaky(self: Any, path: str, *more: Any, **others: Any) -> Any:
        inner = opened(self, path, *more, **others)
        return _Flaky(inner, faults, place) if path.endswith(name) else inner

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", flaky)
        yield faults
