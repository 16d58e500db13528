"""Name and home directory of a user whom the system does not know.

A container often runs as a user id without an entry in passwd, and without HOME. Python then has no
user name and no home directory, and MLflow cannot be imported.
"""

import getpass
import os
import tempfile
from pathlib import Path

from skillnet_platform.storage.private import name_user_directory, private_directory


def prepare_user_environment() -> None:
    """Set LOGNAME and HOME if this process has no user name or no home directory.

    Child processes, such as Ray's, inherit both.

    Raises:
        UserError: no private directory can be created.
    """
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    try:
        Path.home()
    except RuntimeError:
        # Libraries read credentials in the home directory, so nobody else may write to it.
        temporary = Path(tempfile.gettempdir()) / name_user_directory()
        home = private_directory(temporary, "Set HOME to a directory of your own") / "home"
        home.mkdir(exist_ok=True)
        os.environ["HOME"] = str(home)
