"""The cache: bounded, verified, downloaded once, and never taken from under a reader."""

import copy
import hashlib
import os
import signal
import uuid
from pathlib import Path

import pytest

from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.cache import CacheKey, FileCache, cache_folder, cache_limit
from tests.helpers.object_store import ObjectStore
from tests.helpers.processes import fork_context, start_python
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def place() -> str:
    return f"memory://{uuid.uuid4().hex}"


def put(place: str, number: int, size: int = 100) -> CacheKey:
    data = bytes([number]) * size
    uri = directories.join_uri(place, f"shard-{number}")
    directories.write_bytes(uri, data)
    return CacheKey(uri, hashlib.sha256(data).hexdigest(), size)


def names(cache: FileCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if len(path.name) == 64}


def test_the_least_recently_used_goes_first(place: str, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 250)
    one, two, three = (put(place, n) for n in range(3))
    for wanted in (one, two):
        held = cache.hold(wanted)
        assert held.path.read_bytes() == directories.read_bytes(wanted.uri)
        held.release()
        os.utime(held.path, (wanted.bytes, 1 if wanted is one else 2))
    cache.hold(one).release()  # used again: two is the oldest now
    cache.hold(three).release()
    assert names(cache) == {one.sha256, three.sha256}
    assert cache.used() == 200


def test_what_is_in_use_stays(
    place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = FileCache(tmp_path / "cache", 250)
    held = [cache.hold(put(place, n)) for n in range(2)]
    more = cache.hold(put(place, 2))  # needed: over the limit, with a warning
    assert len(names(cache)) == 3
    assert "exceed the cache limit of 250 bytes" in capsys.readouterr().err
    for one in (*held, more):
        one.release()
    cache.hold(put(place, 3)).release()
    assert cache.used() <= 250


def test_prefetching_brings_what_fits(place: str, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 250)
    held = [cache.hold(put(place, n)) for n in range(2)]
    assert len(held) == 2
    cache.prefetch([put(place, 2)])
    wanted = put(place, 3, size=50)
    cache.prefetch([wanted])
    wait_until(lambda: wanted.sha256 in names(cache), 30)
    assert len(names(cache)) == 3
    assert cache.used() == 250


def test_a_prefetch_that_does_not_fit_removes_nothing(place: str, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 250)
    held = cache.hold(put(place, 0))
    cache.hold(put(place, 1)).release()
    cache.prefetch([put(place, 2, size=200)])
    lock = f"{put(place, 2, size=200).sha256}.lock"
    wait_until(lambda: (tmp_path / "cache" / lock).exists() and not cache._coming, 30)
    assert len(names(cache)) == 2
    with pytest.raises(TypeError, match="open in this process"):
        copy.copy(held)


def test_a_file_is_fetched_once(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []
    get = directories.get_file
    monkeypatch.setattr(directories, "get_file", lambda *a: (fetched.append(a[0]), get(*a)))
    cache, wanted = FileCache(tmp_path / "cache", 250), put(place, 1)
    for _ in range(3):
        cache.hold(wanted).release()
    assert fetched == [wanted.uri]
    (tmp_path / "cache" / wanted.sha256).write_bytes(b"cut short")
    cache.hold(wanted).release()
    assert len(fetched) == 2


def test_altered_and_missing_files_are_named(place: str, tmp_path: Path) -> None:
    cache, wanted = FileCache(tmp_path / "cache", 250), put(place, 1)
    directories.write_bytes(wanted.uri, b"\2" + b"\1" * 99)
    with pytest.raises(UserError, match=r"shard-1: altered or cut short: sha256 .* expected"):
        cache.hold(wanted)
    directories.remove_file(wanted.uri)
    with pytest.raises(UserError, match="shard-1: the file is missing"):
        cache.hold(wanted)
    assert names(cache) == set()
    assert cache.used() == 0
    with pytest.raises(UserError, match="expected a SHA-256 in its manifest"):
        CacheKey("s3://b/a", "../../etc/passwd", 3)


def read_often(
    seed: int, variables: dict[str, str], cache: FileCache, wanted: list[CacheKey]
) -> None:
    os.environ.update(variables)
    for turn in range(40):
        one = wanted[turn * (2 * seed + 1) % len(wanted)]
        held = cache.hold(one)
        assert hashlib.sha256(held.path.read_bytes()).hexdigest() == one.sha256
        assert cache.used() <= 500_000, cache.used()
        held.release()
    assert not cache._warned, "it was over its limit"


def test_processes_share_it(object_store: ObjectStore, tmp_path: Path) -> None:
    """Four processes read eight shards through a cache of three: all bytes right, never more."""
    wanted = [put(object_store.uri, n, 100_000) for n in range(8)]
    given = dict(os.environ), FileCache(tmp_path / "cache", 500_000), wanted
    readers = [fork_context().Process(target=read_often, args=(n, *given)) for n in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(300)
    assert [reader.exitcode for reader in readers] == [0] * 4


def test_a_killed_download_leaves_no_debt(
    object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = put(object_store.uri, 1)
    folder = tmp_path / "cache"
    code = (
        "from skillnet_platform.storage import directories\n"
        "from skillnet_platform.storage.cache import FileCache, CacheKey\n"
        "import pathlib, time\n"
        "def stuck(uri, path, sha):\n"
        "    path.with_name(f'.{path.name}.1.x.tmp').write_bytes(b'half')\n"
        "    print('on its way', flush=True)\n"
        "    time.sleep(600)\n"
        "directories.get_file = stuck\n"
        f"FileCache({str(folder)!r}, 250).hold(CacheKey(*{(wanted.uri, wanted.sha256, 100)!r}))\n"
    )
    process = start_python("-c", code, until="on its way")
    cache = FileCache(folder, 250)
    assert cache.used() == 100
    process.send_signal(signal.SIGKILL)
    process.wait()
    for number in (2, 3):
        cache.hold(put(object_store.uri, number)).release()
    assert cache.used() == 200
    assert not list(folder.glob(".*.tmp"))
    cache.hold(wanted).release()


def test_place_and_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SKILLNET_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cache" / "shards"
    assert cache_limit() == 20 * 10**9
    monkeypatch.setenv("SKILLNET_CACHE", str(tmp_path / "other"))
    monkeypatch.setenv("SKILLNET_CACHE_GB", "0.5")
    assert cache_folder() == tmp_path / "other"
    assert cache_limit() == 5 * 10**8
    monkeypatch.setenv("SKILLNET_CACHE_GB", "much")
    with pytest.raises(UserError, match="expected gigabytes"):
        cache_limit()
