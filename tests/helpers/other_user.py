"""Code that runs as another user of this machine, or as a user whom no passwd entry knows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

#: A user id without an entry in passwd.
UNKNOWN_UID = 54321

_DROP = f"""
import os, sys
def drop():
    os.setgroups([])
    os.setgid({UNKNOWN_UID})
    os.setuid({UNKNOWN_UID})
"""


def run_as_other_user(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run Python code that takes the rights of another user when it calls ``drop()``. Needs root.

    Its imports come before that call: the other user may be unable to read the interpreter's
    library.
    """
    assert os.geteuid() == 0
    return subprocess.run(
        [sys.executable, "-c", _DROP + code, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )


def run_as_unknown_user(code: str, **environment: str | None) -> "subprocess.CompletedProcess[str]":
    """Run Python code under a user id that passwd does not know; skip where that is impossible.

    A user namespace changes the id that the code sees. It keeps the rights to read the interpreter.

    Args:
        code: that runs.
        environment: variables to set; None removes one.
    """
    enter = ["unshare", "--user", f"--map-user={UNKNOWN_UID}", f"--map-group={UNKNOWN_UID}"]
    if shutil.which("unshare") is None or subprocess.run([*enter, "true"], check=False).returncode:
        pytest.skip("user namespaces cannot be used here")
    root = Path(__file__).parents[2]
    values = os.environ | {"PYTHONPATH": f"{root}:{root / 'platform'}"} | environment
    values |= dict.fromkeys(("LOGNAME", "LNAME", "USERNAME"))
    return subprocess.run(
        [*enter, sys.executable, "-c", code],
        env={name: value for name, value in values.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=300,
    )
