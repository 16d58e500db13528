"""What keeps the embedded Ray to this machine and to its user: loopback addresses, and a token."""

import contextlib
import functools
import ipaddress
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ADDRESS = "127.0.0.1"

_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

#: Where gloo and NCCL listen in workers; without it they take what the host's name resolves to.
_INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@contextlib.contextmanager
def loopback_environment() -> Iterator[None]:
    """The environment in which to call ``ray.init`` so that what it starts stays on loopback.

    Ray's servers listen on every interface unless the node's address is 127.0.0.1, and ``init``
    replaces that address by an outer one where clusters are switched on, as they are on Linux.
    They are switched off here, as on macOS and Windows, for this one start: the processes inherit
    it, the caller's environment is as before. Ray asks for a token by itself unless
    ``RAY_AUTH_MODE`` is "disabled"; one is made here where the user has none, because Ray would
    leave one in the home directory, after which every other Ray of the user asks for it.
    """
    from skillnet_platform.ray_internals.single_node import CLUSTER_VARIABLE, disable_clusters

    values = {CLUSTER_VARIABLE: "0"} | {k: os.environ.get(k, v) for k, v in _INTERFACES.items()}
    if os.environ.get(_MODE) != "disabled" and not _has_token():
        values[_TOKEN] = _own_token()
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        with disable_clusters():
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def is_loopback_host(host: str) -> bool:
    """Whether only this machine reaches what listens on that interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listens_on_loopback(ray: Any) -> bool:
    """Whether the Ray that this process is connected to is one that listens on loopback only."""
    return bool(ray.util.get_node_ip_address() == ADDRESS)


def require_loopback(ray: Any) -> None:
    """End a Ray that was just started and listens elsewhere.

    Raises:
        RuntimeError: it does: this version of Ray chooses its address in another way.
    """
    if not listens_on_loopback(ray):
        address = ray.util.get_node_ip_address()
        ray.shutdown()
        raise RuntimeError(
            f"Ray {ray.__version__} listens on {address} instead of {ADDRESS}, where others can "
            "reach it, and was ended; install the version that pyproject.toml names"
        )


def _has_token() -> bool:
    """Whether Ray finds a token by itself, in the places where it looks."""
    kept = Path("~/.ray/auth_token").expanduser()
    return bool(os.environ.get(_TOKEN) or os.environ.get(_TOKEN_FILE) or kept.is_file())


@functools.cache
def _own_token() -> str:
    """One for the life of this process: Ray keeps the first that it is given."""
    return secrets.token_hex(32)
