"""Isolation of the embedded Ray: loopback addresses, and a token."""

import contextlib
import functools
import ipaddress
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skillnet_platform.errors import UserError
from skillnet_platform.storage.local import environment_variables

ADDRESS = "127.0.0.1"

_MODE, _TOKEN, _TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

#: Interface of gloo and NCCL in workers; by default they use the address of the host name.
_INTERFACES = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@contextlib.contextmanager
def loopback_environment(variables: Mapping[str, str] | None = None) -> Iterator[None]:
    """Set the environment of a ``ray.init`` whose servers must listen on loopback only.

    Ray's servers listen on every interface unless the node's address is 127.0.0.1. On Linux
    ``init`` replaces that address by an outer one, because clusters are enabled there. This block
    disables clusters for one start: Ray's processes inherit the setting, and the caller's
    environment is restored. Ray requires a token unless ``RAY_AUTH_MODE`` is "disabled". Without
    a token of the user this block generates one: Ray would write one to the home directory, and
    every other Ray of the user would then require it.

    Args:
        variables: more variables for Ray's processes.
    """
    from skillnet_platform.ray_internals.single_node import CLUSTER_VARIABLE, disable_clusters

    values = {CLUSTER_VARIABLE: "0"} | {k: os.environ.get(k, v) for k, v in _INTERFACES.items()}
    values |= variables or {}
    if os.environ.get(_MODE) != "disabled" and not _has_token():
        values[_TOKEN] = _own_token()
    # A later connection to a cluster must not get the settings of loopback.
    with environment_variables(values), disable_clusters():
        yield


def is_loopback_host(host: str) -> bool:
    """Return whether an interface is reachable from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def choose_port(host: str, port: int) -> int:
    """Return a port that no program uses: ``port``, or any free one for 0.

    Args:
        host: interface to listen on.
        port: port to listen on.

    Raises:
        UserError: another program uses the port, or the interface does not exist.
    """
    with socket.socket() as probe:
        # Without it a port counts as used for a while after an earlier server ended.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--host {host} --port {port}: cannot listen there ({error.strerror}); give "
                "another port, or --port 0 for a free port"
            ) from None
        return int(probe.getsockname()[1])


def listens_on_loopback(ray: Any) -> bool:
    """Return whether the connected Ray listens on loopback only."""
    return bool(ray.util.get_node_ip_address() == ADDRESS)


def require_loopback(ray: Any) -> None:
    """Shut down a Ray that listens on another address.

    Raises:
        RuntimeError: Ray chose another address; this version of Ray differs from the tested one.
    """
    if not listens_on_loopback(ray):
        address = ray.util.get_node_ip_address()
        # Shut down first: until then other machines reach its ports.
        ray.shutdown()
        raise RuntimeError(
            f"Ray {ray.__version__} listens on {address} instead of {ADDRESS}, where other "
            "machines can reach it, and was shut down. Install the version of pyproject.toml"
        )


def _has_token() -> bool:
    """Return whether Ray finds a token of the user."""
    kept = Path("~/.ray/auth_token").expanduser()
    return bool(os.environ.get(_TOKEN) or os.environ.get(_TOKEN_FILE) or kept.is_file())


@functools.cache
def _own_token() -> str:
    """Return the token of this process: Ray keeps the first token that it gets."""
    return secrets.token_hex(32)
