"""Locks between hosts: two hosts, one folder, on a shared disk and in each kind of store."""

import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import finetune
from pipelines.data.preprocessing import pipeline
from pipelines.training.config.run import FinetuneConfig
from pipelines.training.runs.layout import lock_run_folder
from skillnet_platform.storage import directories, location, locks, run_root
from skillnet_platform.storage.location import Location, join_location
from skillnet_platform.storage.locks import HostLease, LockHeldError, hold_lease, is_shared_disk
from skillnet_studies.compare import compare
from skillnet_studies.config.study import StudyConfig, SystemConfig
from sweeps.config.sweep import SweepConfig
from sweeps.sweep import sweep
from tests.helpers.processes import start_python

SYSTEMS = {name: SystemConfig(system=name) for name in ("skillnet", "dense")}

SPACE = {"training.lr": {"choice": [1e-3, 2e-3]}}

#: A run on another host: it holds the lease and shows signs of life until it is killed.
HOLD = """
import socket, sys, time
from pathlib import Path
socket.gethostname = lambda: "node-1"
from skillnet_platform.storage import locks
locks.this_process = lambda: "node-1:boot:1:7:1"
locks.BEAT_S = 0.05
place = sys.argv[1]
with locks.hold_lease(place if "://" in place else Path(place), str):
    print("ready", flush=True)
    time.sleep(600)
"""


#: Google's emulator knows no conditional writes.
everywhere = pytest.mark.parametrize(
    "store_uri", ["file", "memory", "s3", "azure", "disk"], indirect=True
)


@pytest.fixture
def folder(store_uri: str) -> Location:
    """The folder of a lease, by its URI or as a path."""
    return Path(store_uri, "a") if store_uri.startswith("/") else f"{store_uri}/a"


class Clock:
    """Time of a watcher, which moves only while it waits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.on_wait = 1000.0, lambda: None
        monkeypatch.setattr(locks, "monotonic", lambda: self.now)
        monkeypatch.setattr(locks, "sleep", self._wait)

    def _wait(self, seconds: float) -> None:
        self.now += seconds
        self.on_wait()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def host(name: str, folder: Location) -> HostLease:
    """The lease as a process of that host asks for it."""
    lease = HostLease(folder, lambda holder: f"{folder}: {holder} works here")
    lease._record |= {"host": name, "process": f"{name}:boot:1:7:1", "pid": 7}
    return lease


def numbers(folder: Location) -> list[str]:
    return [name for name in location.list_location(folder) if not name.startswith(".")]


@everywhere
def test_one_of_two_hosts_works(
    folder: Location, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A holder that lives is named, one that ended leaves nothing, one that is gone is replaced."""
    one, two, three = (host(name, folder) for name in ("node-1", "node-2", "node-3"))
    one.acquire()
    clock.on_wait = one.renew
    with pytest.raises(LockHeldError, match=r"process 7 on node-1 \(.*, since .*\) works here.*60"):
        two.acquire()
    assert "may hold this lease; watching it for up to 60 s" in capsys.readouterr().err
    assert numbers(folder) == ["00000001.json"]
    one.release()
    assert numbers(folder) == []
    two.acquire()
    clock.on_wait = lambda: None  # the host is gone: its file stays as it is
    before = clock.now
    three.acquire()
    assert clock.now - before >= locks.LEASE_S
    assert numbers(folder) == ["00000002.json"]
    with pytest.raises(LockHeldError, match=r"node-3.*took over"):
        two.renew()
    three.renew()
    assert numbers(folder) == ["00000002.json"]
    three.release()


@everywhere
def test_of_many_hosts_that_take_over_one_wins(folder: Location, clock: Clock) -> None:
    host("node-0", folder).acquire()
    hosts = [host(f"node-{n}", folder) for n in range(1, 6)]
    start = threading.Barrier(len(hosts))
    won: list[HostLease] = []

    def race(lease: HostLease) -> None:
        start.wait()
        if lease._claim(2):
            won.append(lease)

    threads = [threading.Thread(target=race, args=(lease,)) for lease in hosts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    won[0].renew()
    assert numbers(folder) == ["00000002.json"]


def test_a_host_that_slept_through_a_change_of_hands_is_refused(
    tmp_path: Path, clock: Clock
) -> None:
    """It saw a dead holder, was suspended, and wakes when others have taken the lease and go on."""
    late, second, third = (host(name, tmp_path) for name in ("late", "second", "third"))
    host("node-0", tmp_path).acquire()
    assert second._claim(2)
    assert third._claim(3)
    assert not late._claim(2)
    third.renew()
    assert numbers(tmp_path) == ["00000003.json"]


@pytest.mark.parametrize("where", ["between two reads", "in the first read"])
def test_a_watcher_does_not_count_the_time_in_which_it_did_not_look(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It was suspended, or a read waited for the store; the holder shows a sign of life after."""
    one, other = host("node-1", tmp_path), host("node-2", tmp_path)
    one.acquire()
    read = location.read_if_exists
    sleeps = [2 * locks.LEASE_S]

    def sleep_once() -> None:
        clock.now += sleeps.pop() if sleeps else 0.0

    def slow_read(place: Location) -> bytes | None:
        sleep_once()
        return read(place)

    if where == "in the first read":
        monkeypatch.setattr(location, "read_if_exists", slow_read)
        clock.on_wait = lambda: clock.now < 1130 or one.renew()
    else:
        clock.on_wait = lambda: (sleep_once(), one.renew())
    with pytest.raises(LockHeldError, match="node-1"):
        other.acquire()


def test_a_process_of_this_host_is_known_to_live_or_to_be_dead(tmp_path: Path) -> None:
    """No wait: the kernel knows, also if another process has the number of a dead one."""
    folder = tmp_path / ".lease"
    lease = HostLease(folder, str)
    lease.acquire()
    with pytest.raises(LockHeldError, match=f"process {os.getpid()} on"):
        HostLease(folder, str).acquire()
    with hold_lease(tmp_path / "other", str), hold_lease(tmp_path / "other", str):
        assert numbers(tmp_path / "other") == ["00000001.json"]
    (file,) = folder.iterdir()
    record = json.loads(file.read_text())
    where, pid, start = locks.this_process().rsplit(":", 2)
    for dead in (f"{where}:{pid}:1", f"{where}:{2**22 + 1}:{start}"):
        file.write_text(json.dumps(record | {"process": dead}))
        HostLease(folder, str).acquire()
        (file,) = folder.iterdir()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"pid": "x"}', b"\xff"])
def test_a_damaged_lease_ends_like_any_other(tmp_path: Path, clock: Clock, content: bytes) -> None:
    (tmp_path / "00000004.json").write_bytes(content)
    for name in ("7.json", "notes.txt"):
        (tmp_path / name).write_text("of a user")
    lease = HostLease(tmp_path, str)
    lease.acquire()
    assert numbers(tmp_path) == ["00000005.json", "7.json", "notes.txt"]


def test_a_driver_that_lost_its_run_ends_in_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """The one that was cut off is stopped when it looks again."""
    stopped = threading.Event()
    monkeypatch.setattr(locks, "interrupt_main", lambda _: stopped.set())
    monkeypatch.setattr(locks, "BEAT_S", 0.01)
    with (
        pytest.raises(LockHeldError, match=r"node-2.*took over, because this host gave no sign"),
        hold_lease(tmp_path, str),
    ):
        assert host("node-2", tmp_path)._claim(2)
        assert stopped.wait(60)
    assert numbers(tmp_path) == ["00000002.json"]


@pytest.mark.parametrize("error", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_disk_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    assert location.write_if_absent(tmp_path / "a", b"one")
    assert not location.write_if_absent(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"one"


def test_a_store_without_conditional_writes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    put = MemoryFileSystem.pipe_file

    def refuse(self: Any, path: str, value: bytes, mode: str = "overwrite") -> None:
        if mode == "create":
            raise OSError(errno.ENOSYS, "A header you provided implies functionality …")
        put(self, path, value)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", refuse)
    assert location.write_if_absent(f"memory://{tmp_path.name}/a", b"one")
    assert "no conditional writes. Start no second process" in capsys.readouterr().err


@everywhere
def test_a_create_whose_answer_was_lost_is_not_taken_for_anothers(
    folder: Location,
) -> None:
    place = join_location(folder, "00000001.json")
    assert location.write_if_absent(place, b"mine")
    assert location.write_if_absent(place, b"mine"), (
        "the repeated request met its own first attempt"
    )
    assert not location.write_if_absent(place, b"another's")


@pytest.mark.parametrize("store_uri", ["google"], indirect=True)
def test_google_asks_for_an_absent_object(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its emulator ignores the condition, so what the client asks for is checked."""
    import gcsfs

    asked: list[Any] = []
    call = gcsfs.GCSFileSystem._request

    async def record(self: Any, method: str, path: str, *more: Any, **keys: Any) -> Any:
        asked.append(keys)
        return await call(self, method, path, *more, **keys)

    monkeypatch.setattr(gcsfs.GCSFileSystem, "_request", record)
    assert location.write_if_absent(f"{store_uri}/a", b"one")
    assert any(keys.get("ifGenerationMatch") == "0" for keys in asked)


def _mounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    point = str(tmp_path).replace(" ", "\\040")
    lines = f"1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:9 / {point} rw shared:5 - {kind} host:/x rw\n"
    read = Path.read_text

    def read_text(self: Path, *more: Any, **keys: Any) -> str:
        return lines if str(self) == "/proc/self/mountinfo" else read(self, *more, **keys)

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("kind", "is_shared"),
    [("nfs4", True), ("fuse.sshfs", True), ("lustre", True), ("cifs", True), ("xfs", False)],
)
def test_a_disk_of_several_hosts_is_distinguished_from_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, is_shared: bool
) -> None:
    _mounts(tmp_path / "my disk", monkeypatch, kind)
    assert is_shared_disk(tmp_path / "my disk" / "runs" / "a") is is_shared
    assert not is_shared_disk(tmp_path / "my disk2")


def _on_a_shared_disk(tmp_path: Path, patch: pytest.MonkeyPatch, _: Any) -> tuple[Path, None]:
    _mounts(tmp_path, patch, "nfs4")
    return tmp_path / "a", None


def _in_a_store(tmp_path: Path, _: Any, store: Any) -> tuple[Path, str]:
    return tmp_path / "a", f"{store.uri}/a"


@pytest.mark.parametrize("place", [_on_a_shared_disk, _in_a_store])
def test_the_second_of_two_drivers_is_refused(
    place: Callable[..., tuple[Path, str | None]],
    object_store: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two hosts, two disks or one without locks between them, one run."""
    run, mirror = place(tmp_path, monkeypatch, object_store)
    folder = str(join_location(mirror or run, locks.LEASE))
    with start_python("-c", HOLD, folder, until="ready") as driver:
        with (
            pytest.raises(LockHeldError, match=r"process \d+ on node-1 .*works in this folder now"),
            lock_run_folder(run, mirror),
        ):
            raise AssertionError("two at once")
        driver.kill()
    monkeypatch.setattr(locks, "LEASE_S", 0.0)
    with lock_run_folder(run, mirror):
        (run / "config.yaml").write_text("seed: 0")
    assert location.list_location(join_location(mirror or run, locks.LEASE)) == []


def _prepare(uri: str) -> None:
    identity = {"corpus": "a", "tokenizer": None}
    job: Any = SimpleNamespace(final_dir=run_root() / "staging" / "a", identity=identity)
    job.final_dir.parent.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        pipeline._start_job(job, uri, stack)


@pytest.mark.parametrize(
    ("start", "lease"),
    [
        (lambda uri: finetune.finetune(FinetuneConfig(name="a", run_dir=uri)), "a/.lease"),
        (lambda uri: sweep(SweepConfig(name="a", run_dir=uri, space=SPACE)), "a/.lease"),
        (lambda uri: compare(StudyConfig(name="a", run_dir=uri, systems=SYSTEMS)), "a/.lease"),
        (_prepare, ".a.lease"),
    ],
    ids=["finetune", "sweep", "compare", "prepare"],
)
def test_each_command_that_writes_to_a_store_is_refused(
    start: Callable[[str], Any], lease: str, clock: Clock, tmp_path: Path
) -> None:
    uri = f"memory://{tmp_path.name}"
    other = host("node-9", f"{uri}/{lease}")
    other.acquire()
    clock.on_wait = other.renew
    with pytest.raises(LockHeldError, match=r"process 7 on node-9 .* (works|prepares) "):
        start(uri)
    assert [entry.name for entry in directories.list_files(uri)] == [f"{lease}/00000001.json"]


def test_a_run_on_this_machine_continues_while_its_store_is_away(
    object_store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SKILLNET_STORE_PATIENCE", "0.1")
    object_store.door.shut()
    try:
        with (
            pytest.raises(locks.StoreUnavailableError),
            lock_run_folder(tmp_path / "new", f"{object_store.uri}/new"),
        ):
            raise AssertionError("the store is away")
        assert not (tmp_path / "new").exists()
        (tmp_path / "old").mkdir()
        (tmp_path / "old" / "config.yaml").write_text("seed: 0")
        with lock_run_folder(tmp_path / "old", f"{object_store.uri}/old"):
            assert "nothing would refuse it" in capsys.readouterr().err
    finally:
        object_store.door.unshut()
