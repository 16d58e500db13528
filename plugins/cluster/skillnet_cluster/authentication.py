"""Passwords of the tracking server: hashed once, then known for some minutes.

MLflow hashes the password at every request, which costs 0.3 s of CPU, and answers faster for a user
who does not exist. ``skillnet tracker`` names :func:`authenticate_request` in the configuration of
MLflow's authentication, which calls it for each request.
"""

import hmac
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.server import auth
from werkzeug.security import check_password_hash, generate_password_hash

#: Seconds for which a verified password needs no hash.
FRESH_S = 300.0
#: Locks that keep equal requests from hashing at the same time.
LOCKS = 64


class VerifiedCredentials:
    """Passwords that were verified a short time ago.

    An entry is a keyed digest of user, password and stored hash. The key is random and stays in
    this process. A changed password changes the stored hash, so the old password is rejected at
    once, also by other server processes.

    Args:
        read_hash: returns the stored hash of a user's password, or None for an unknown user.
        check_hash: compares a stored hash with a password.
        clock: returns seconds.
    """

    def __init__(
        self,
        read_hash: Callable[[str], str | None],
        check_hash: Callable[[str, str], bool] = check_password_hash,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read_hash, self._check_hash, self._clock = read_hash, check_hash, clock
        self._key = secrets.token_bytes(32)
        self._locks = [threading.Lock() for _ in range(LOCKS)]
        # One entry per user, so that the number of users limits the memory.
        self._verified: dict[str, tuple[bytes, float]] = {}
        # Unknown users take as long as known ones, so that time reveals no names.
        self._nobody = generate_password_hash(secrets.token_urlsafe())

    def verify(self, username: str | None, password: str | None) -> bool:
        """Return whether a user exists and has this password."""
        if username is None or password is None:
            return False
        stored = self._read_hash(username)
        compared = self._nobody if stored is None else stored
        parts = (part.encode() for part in (username, password, compared))
        message = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        digest = hmac.digest(self._key, message, "sha256")
        if self._is_fresh(username, digest):
            return True
        # Many clients of one user start together: the first hashes, the others wait for it.
        with self._locks[digest[0] % LOCKS]:
            if self._is_fresh(username, digest):
                return True
            if not self._check_hash(compared, password) or stored is None:
                return False
            self._verified[username] = (digest, self._clock() + FRESH_S)
            return True

    def _is_fresh(self, username: str, digest: bytes) -> bool:
        known, end = self._verified.get(username, (b"", 0.0))
        return hmac.compare_digest(known, digest) and self._clock() < end


def read_password_hash(store: Any, username: str) -> str | None:
    """Return the hash of a user's password in MLflow's store, or None for an unknown user."""
    with store.ManagedSessionMaker(read_only=False) as session:
        try:
            return str(store._get_user(session, username).password_hash)
        except MlflowException:
            return None


def cache_credentials(store: Any) -> VerifiedCredentials:
    """Make MLflow's store of users verify passwords through :class:`VerifiedCredentials`."""
    verified = VerifiedCredentials(lambda username: read_password_hash(store, username))

    def authenticate_user(
        username: str | None, password: str | None, *, use_primary: bool = False
    ) -> bool:
        return verified.verify(username, password)

    # On the store: both of MLflow's request paths, Flask and FastAPI, ask it.
    store.authenticate_user = authenticate_user
    return verified


def authenticate_request() -> Any:
    """Return the user of a Flask request, or the response that asks for a password."""
    return auth.authenticate_request_basic_auth()


cache_credentials(auth.store)
