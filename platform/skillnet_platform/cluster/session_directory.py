"""Directory of Ray's sessions: sockets, logs and object spills.

Ray gives its sessions mode 0777 (``/tmp/ray``). A user who can replace a socket there receives the
token and can run code in the session. The sessions therefore lie in a directory of mode 0700.
"""

import os
import tempfile
from pathlib import Path

from skillnet_platform.errors import UserError
from skillnet_platform.storage.private import name_user_directory, private_directory

#: Ray's variable: it keeps sessions in ``$RAY_TMPDIR/ray``, and locks beside that directory.
DIRECTORY_VARIABLE = "RAY_TMPDIR"

#: Linux limits the path of a socket.
_LONGEST_SOCKET_BYTES = 107
#: The longest path of a socket inside the directory of sessions.
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/dash_TaskEventsHead"
_ADVICE = f"Set {DIRECTORY_VARIABLE} to a directory of your own, with a short path"


def prepare_session_directory() -> Path:
    """Create the private directory of Ray's sessions.

    It is ``skillnet-UID`` in ``RAY_TMPDIR``, in the system's temporary directory, or in ``/tmp`` if
    that path is too long for sockets.

    Returns:
        The value of ``RAY_TMPDIR`` for Ray's processes. Ray creates its directory ``ray`` there.

    Raises:
        UserError: the directory is not private, or its path is too long.
    """
    name = name_user_directory()
    given = os.environ.get(DIRECTORY_VARIABLE)
    base = Path(given or tempfile.gettempdir()).absolute()
    # setup_node.sh sets the variable to the private directory.
    directory = base if base.name == name else base / name
    if _socket_bytes(directory) > _LONGEST_SOCKET_BYTES:
        if given:
            raise UserError(f"{DIRECTORY_VARIABLE}={given}: too long for Ray's sockets. {_ADVICE}.")
        directory = Path("/tmp") / name  # noqa: S108
    return private_directory(directory, _ADVICE)


def _socket_bytes(directory: Path) -> int:
    return len(os.fsencode(f"{directory}/ray{_SOCKET}"))
