"""Runs of killed processes are recognised; runs of processes that cannot be seen are left alone."""

import os
import shutil
from pathlib import Path

import pytest

from skillnet_platform.storage import locks
from tests.helpers.processes import run_python

ROOT = Path(__file__).parents[3]
_PRINT = "from skillnet_platform.storage import locks; print(locks.this_process())"


def identity_of_child(*prefix: str) -> str:
    done = run_python("-c", _PRINT, before=prefix)
    if done.returncode and prefix:
        pytest.skip(f"no PID namespaces here: {done.stderr[-200:]}")
    return done.stdout.strip()


def test_a_process_has_ended_when_its_id_is_gone_or_used_again() -> None:
    assert not locks.has_ended(locks.this_process())
    assert locks.has_ended(identity_of_child())
    same_id = locks.this_process().rpartition(":")[0] + ":1"
    assert locks.has_ended(same_id)
    assert not locks.has_ended("")


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_process_of_a_container_with_the_same_host_name_is_not_closed() -> None:
    new_namespace = ("unshare", "--pid", "--fork", "--mount-proc")
    if os.geteuid() != 0:
        new_namespace = (new_namespace[0], "--user", "--map-root-user", *new_namespace[1:])
    other = identity_of_child(*new_namespace)
    assert other.partition(":")[0] == locks.this_process().partition(":")[0]
    assert not locks.has_ended(other)


def test_a_process_of_another_machine_with_the_same_host_name_is_not_closed() -> None:
    host, boot, *rest = locks.this_process().split(":")
    assert boot
    assert not locks.has_ended(":".join([host, "0" + boot[1:] + "0", *rest[:-1], "1"]))
