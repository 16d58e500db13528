"""The embedded Ray gets a second chance on a busy machine."""

from types import SimpleNamespace
from typing import Any

import pytest

from skillnet_platform.cluster.connect import start_embedded_ray
from skillnet_platform.errors import UserError

#: Message of ray._private.node in Ray 2.60.
TOO_SLOW = (
    "The current node timed out during startup. This could happen because some of the raylet "
    "failed to startup or the GCS has become overloaded."
)


def slow_ray(*failures: Exception) -> tuple[Any, list[str]]:
    """Return a module whose first starts fail, and the list of its calls."""
    left, calls = list(failures), list[str]()

    def init(**options: object) -> None:
        calls.append(f"init {options}")
        if left:
            raise left.pop(0)

    return SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown")), calls


def test_a_slow_start_is_repeated_once(capsys: pytest.CaptureFixture[str]) -> None:
    ray, calls = slow_ray(Exception(TOO_SLOW))
    start_embedded_ray(ray, num_cpus=2)
    assert calls == ["init {'num_cpus': 2}", "shutdown", "init {'num_cpus': 2}"]
    assert "starting it again" in capsys.readouterr().err


def test_two_slow_starts_have_one_message() -> None:
    ray, calls = slow_ray(Exception(TOO_SLOW), Exception(TOO_SLOW))
    with pytest.raises(UserError, match="did not start within 30 s, twice"):
        start_embedded_ray(ray)
    assert calls[-1] == "shutdown"


def test_another_failure_is_not_repeated() -> None:
    ray, calls = slow_ray(RuntimeError("no port"))
    with pytest.raises(RuntimeError, match="no port"):
        start_embedded_ray(ray)
    assert calls == ["init {}"]
