"""Requests of one user cost one hash, and unknown users cost as much as known ones."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flask_wtf", reason="needs Flask-WTF: pip install '.[tracker]'")

from werkzeug.security import check_password_hash

from skillnet_cluster import tracker
from skillnet_platform.tracking.backend import sqlite_uri


@pytest.fixture(scope="module")
def users(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """MLflow's own store of users, with one user."""
    # Its import takes three seconds, in each process that collects tests.
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("users")
        patch.setenv("SKILLNET_HOME", str(folder))
        uri = tracker.resolve_store(None)
        for name, value in tracker.write_secrets(uri, folder / "tracker").items():
            patch.setenv(name, value)
        store = SqlAlchemyStore()
        store.init_db(uri.reveal())
        store.create_user("ada", "correct horse")
        yield store


class Hashes:
    """The real comparison, counted, and a clock that the test moves."""

    def __init__(self, users: Any) -> None:
        from skillnet_cluster import authentication

        self.count: Counter[str] = Counter()
        self.now = 0.0
        self.kept = authentication.VerifiedCredentials(
            lambda name: authentication.read_password_hash(users, name),
            self._check,
            lambda: self.now,
        )

    def _check(self, stored: str, password: str) -> bool:
        self.count[password] += 1
        return check_password_hash(stored, password)


def test_fifty_clients_of_one_user_cost_one_hash(users: Any) -> None:
    hashes = Hashes(users)
    answers: list[bool] = []

    def ask() -> None:
        answers.append(hashes.kept.verify("ada", "correct horse"))

    clients = [threading.Thread(target=ask) for _ in range(50)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert answers == [True] * 50
    assert hashes.count == {"correct horse": 1}
    hashes.now = 301.0
    assert hashes.kept.verify("ada", "correct horse")
    assert hashes.count == {"correct horse": 2}, "a verified password is not known for ever"


def test_an_unknown_user_costs_the_hash_of_a_known_one(users: Any) -> None:
    hashes = Hashes(users)
    assert not hashes.kept.verify("ada", "wrong")
    assert not hashes.kept.verify("nobody", "unknown")
    assert hashes.count == {"wrong": 1, "unknown": 1}
    assert not hashes.kept.verify("ada", "wrong"), "a wrong password is not remembered"
    assert hashes.count["wrong"] == 2
    assert not hashes.kept.verify("ada", None)
    assert not hashes.kept.verify(None, "unknown")


def test_a_changed_password_counts_at_once_in_every_process(users: Any) -> None:
    first, second = Hashes(users), Hashes(users)
    users.create_user("grace", "first password")
    assert first.kept.verify("grace", "first password")
    assert second.kept.verify("grace", "first password")
    users.update_user("grace", password="second password")
    for hashes in (first, second):
        assert not hashes.kept.verify("grace", "first password")
        assert hashes.kept.verify("grace", "second password")
    users.delete_user("grace")
    assert not first.kept.verify("grace", "second password")


def test_no_clear_password_is_kept(users: Any) -> None:
    hashes = Hashes(users)
    assert hashes.kept.verify("ada", "correct horse")
    assert "correct horse" not in repr(vars(hashes.kept))


def test_the_server_uses_the_cache_on_both_of_its_request_paths(users: Any) -> None:
    from mlflow.server import auth

    from skillnet_cluster import authentication

    module, name = tracker.AUTHORIZATION.split(":")
    assert (module, name) == (authentication.__name__, authentication.authenticate_request.__name__)
    assert "authenticate_user" in vars(auth.store)


def test_the_uri_of_the_users_is_only_in_a_private_file(tmp_path: Path, users: Any) -> None:
    uri = tracker.resolve_store(sqlite_uri(tmp_path / "50%.db"))
    tracker.write_secrets(uri, tmp_path / "tracker")
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "tracker").iterdir()} == {0o600}
