"""Code that runs as another user of this machine, or as a user whom no passwd entry knows."""

import os
import subprocess
import sys

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
        timeout=60,
    )
