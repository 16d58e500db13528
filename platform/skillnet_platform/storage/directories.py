"""Folders in an object store, by URI: ``s3://bucket/prefix``, ``gs://…``, ``file://…``.

Any file system of fsspec works. An object store has no rename, so a folder is *committed* when its
manifest exists. The manifest is written last and removed first. A folder without a manifest is the
leftover of an interrupted upload and is ignored.

    put_directory("runs/a/checkpoints/step-00000500", "s3://bucket/runs/a/checkpoints/step-…")
    is_committed("s3://bucket/runs/a/checkpoints/step-00000500")
    get_directory("s3://bucket/…", "elsewhere/step-00000500", check=checkpoints.verify_checkpoint)

Every function repeats transient failures: see :func:`retry_transient`.
"""

import base64
import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from skillnet_files.commit import temporary_file
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_platform.storage import local as local_storage
from skillnet_platform.storage.retry import AZURE, missing_bucket, retry_transient

Result = TypeVar("Result")

#: Schemes of addresses that are not object stores.
_NOT_STORES = ("models", "runs", "http", "https")
#: Options of the client for ``s3://``.
_S3_OPTIONS = {
    # Other nodes write to the same folders: a cached listing would hide their files.
    "use_listings_cache": False,
    # A hanging request ends soon: retry_transient repeats it.
    "config_kwargs": {
        "connect_timeout": 10,
        "read_timeout": 30,
        "retries": {"mode": "standard", "max_attempts": 2},
    },
}


@dataclass(frozen=True)
class ObjectEntry:
    """File in an object store.

    Args:
        name: relative to the listed folder.
        bytes: size of the file.
    """

    name: str
    bytes: int


def is_uri(place: str | os.PathLike[str] | None) -> bool:
    """Return whether a text is the URI of an object store, not a path or registry address."""
    scheme, mark, _ = str(place or "").partition("://")
    return bool(mark) and scheme.isidentifier() and scheme not in _NOT_STORES


def require_no_secret(uri: str) -> None:
    """Check that a location can hold no password, key or token: manifests and logs show it.

    Raises:
        UserError: it holds one.
    """
    shown = SecretUri(uri)
    if shown.has_secret or shown.is_redacted:
        raise UserError(
            f"{shown}: the hidden part may be a password, a key or a token, which manifests and "
            "logs would show. Remove it, and give it to the store's client in the environment, "
            "such as AWS_SECRET_ACCESS_KEY or FSSPEC_SFTP_PASSWORD"
        )


def join_uri(uri: str, *names: str) -> str:
    """Return a URI below another: ``("s3://b/x/", "y", "z.json") -> "s3://b/x/y/z.json"``.

    Names may go up, such as ``../tokenizer.json`` of a manifest, but not above the bucket.

    Args:
        uri: address of a folder.
        names: path components.

    Raises:
        UserError: a name leads above the bucket.
    """
    scheme, _, place = uri.partition("://")
    parts: list[str] = []
    for part in PurePosixPath("/".join([place.rstrip("/"), *names])).parts:
        # Resolved here: a store would treat `..` as a part of the object's name.
        if part == "..":
            if len([p for p in parts if p != "/"]) < 2:
                raise UserError(f"{'/'.join(names)} leads out of {uri}")
            parts.pop()
        else:
            parts.append(part)
    return f"{scheme}://{PurePosixPath(*parts)}"


def last_name(uri: str) -> str:
    """Return the last component of a URI."""
    return uri.rstrip("/").rpartition("/")[2]


def object_exists(uri: str) -> bool:
    """Return whether an object exists (folders are not objects).

    Raises:
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """
    return info_of(uri) is not None


def open_file(uri: str) -> IO[bytes]:
    """Open an object for reading with random access; the caller closes it.

    Raises:
        FileNotFoundError: the object does not exist.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """
    stream: IO[bytes] = _in_bucket(uri, lambda system, path: system.open(path, "rb"))
    return stream


def read_bytes(uri: str) -> bytes:
    """Return the content of a small object.

    Raises:
        FileNotFoundError: the object does not exist.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """
    return _in_bucket(uri, lambda system, path: bytes(system.cat_file(path)))


def write_bytes(uri: str, data: bytes) -> None:
    """Write a small object; readers see the old or the complete new object."""

    def write(system: Any, path: str) -> None:
        # A store replaces an object atomically, but a write to a disk can be cut short.
        if is_local_uri(uri):
            with local_storage.atomic_write(path) as stream:
                stream.write(data)
        else:
            system.pipe_file(path, data)

    _in_bucket(uri, write)


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a small object unless it exists; of several writers at most one succeeds.

    Args:
        uri: URI of the object.
        data: content that no other writer has, such as one with a random part.

    Returns:
        Whether the object is that of this call.

    Raises:
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """

    def create(system: Any, path: str) -> bool:
        if is_local_uri(uri):
            return local_storage.create_file(path, data)
        try:
            system.pipe_file(path, data, mode="create")
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            console.print_warning(
                f"{uri}: this store has no conditional writes. Start no second process for the "
                "same work"
            )
            system.pipe_file(path, data)
        return True

    try:
        return _in_bucket(uri, create)
    except (FileExistsError, UserError):
        # Clients differ in the error. A repeated request may also meet its own first attempt.
        if not object_exists(uri):
            raise
        return read_bytes(uri) == data


def put_file(local: str | os.PathLike[str], uri: str) -> None:
    """Upload a file; readers see the old or the complete new object.

    Raises:
        FileNotFoundError: the local file does not exist.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """

    def put(system: Any, path: str) -> None:
        if is_local_uri(uri):
            with Path(local).open("rb") as source, local_storage.atomic_write(path) as stream:
                shutil.copyfileobj(source, stream)
        else:
            system.put_file(str(local), path)

    _in_bucket(uri, put)


def copy_file(source: str, target: str) -> None:
    """Copy an object within a store, without a transfer through this machine.

    Raises:
        FileNotFoundError: the object does not exist.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """

    def copy(system: Any, place: str) -> None:
        if is_local_uri(target):
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        system.cp_file(open_store(source)[1], place)

    _in_bucket(target, copy)


def get_file(uri: str, local: str | os.PathLike[str], sha256: str | None = None) -> None:
    """Download a file to a temporary name, check its hash, and rename it.

    Args:
        uri: address of the object.
        local: path of the file.
        sha256: expected hash in hexadecimal. ``None`` skips the check.

    Raises:
        FileNotFoundError: the object does not exist.
        UserError: the content has another hash, or the disk is full; see also
            :func:`retry_transient`.
    """
    target = Path(local)
    target.parent.mkdir(parents=True, exist_ok=True)

    def get(system: Any, path: str) -> None:
        with local_storage.disk_guard(target):
            system.get_file(path, str(aside))

    with temporary_file(target) as aside:
        _in_bucket(uri, get)
        if sha256 is not None:
            found = local_storage.sha256_file(aside)
            if found != sha256:
                raise UserError(
                    f"{uri}: altered or cut short: sha256 {found}, expected {sha256}. "
                    "Put the right file there again"
                )
        aside.replace(target)


def list_files(uri: str) -> list[ObjectEntry]:
    """Return all files below a folder, sorted by name; empty if there are none.

    Raises:
        UserError: the bucket does not exist, or may not be listed.
        StoreUnavailableError: see :func:`retry_transient`.
    """

    def found(system: Any, path: str) -> list[ObjectEntry]:
        # fsspec caches listings, but other nodes add and remove files.
        system.invalidate_cache(path)
        top = path.rstrip("/") + "/"
        entries = system.find(path, detail=True)
        return sorted(
            (
                ObjectEntry(name.removeprefix(top), int(info["size"]))
                for name, info in entries.items()
                # `find` of a file returns the file itself, which is not below a folder.
                if name.startswith(top)
            ),
            key=lambda entry: entry.name,
        )

    return _or_nothing(uri, found)


def list_folders(uri: str) -> list[str]:
    """Return the names of the folders in a folder, sorted."""

    def found(system: Any, path: str) -> list[str]:
        system.invalidate_cache(path)
        entries = system.ls(path, detail=True)
        return sorted(
            PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory"
        )

    return _or_nothing(uri, found)


def remove_file(uri: str) -> None:
    """Remove an object, if it exists."""

    def remove() -> None:
        system, path = open_store(uri)
        try:
            system.rm_file(path)
        except FileNotFoundError:
            return

    retry_transient(uri, remove)


def info_of(uri: str) -> dict[str, Any] | None:
    """Return the metadata of an object, or ``None`` if the object does not exist.

    Raises:
        UserError: the bucket does not exist; see also :func:`retry_transient`.
    """

    def ask(system: Any, path: str) -> dict[str, Any] | None:
        system.invalidate_cache(path)
        info: dict[str, Any] = system.info(path)
        return info if info["type"] == "file" else None

    try:
        return _in_bucket(uri, ask)
    except FileNotFoundError:
        return None


def md5_of(info: Mapping[str, Any]) -> bytes | None:
    """Return the MD5 of an object from the metadata of :func:`info_of`, or ``None``.

    S3 has it as the tag of an object that was uploaded in one part and is not encrypted by a key.
    GCS has it in base64, except for composed objects. Azure has it for one block, or if the client
    sent it.
    """
    tag = str(info.get("ETag") or "").strip('"')
    if re.fullmatch("[0-9a-f]{32}", tag):
        return bytes.fromhex(tag)
    if isinstance(given := info.get("md5Hash"), str):
        return base64.b64decode(given)
    # Azure's mapping type is not a Mapping of Python.
    given = (info.get("content_settings") or {}).get("content_md5")
    return bytes(given) if given else None


def _in_bucket(uri: str, action: Callable[[Any, str], Result]) -> Result:
    """Run an action on a store and a path with retries; a missing bucket is a user error.

    Raises:
        FileNotFoundError: the object does not exist.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """
    try:
        return retry_transient(uri, lambda: action(*open_store(uri)))
    except FileNotFoundError:
        # Clients report a missing bucket like a missing object.
        _require_bucket(uri)
        raise


def _or_nothing(uri: str, found: Callable[[Any, str], list[Any]]) -> list[Any]:
    try:
        entries = retry_transient(uri, lambda: found(*open_store(uri)))
    except FileNotFoundError:
        entries = []
    if not entries:
        # An empty listing can also mean that the bucket does not exist.
        _require_bucket(uri)
    return entries


def _require_bucket(uri: str) -> None:
    """Distinguish a missing bucket from a missing object.

    Raises:
        UserError: the bucket does not exist.
    """
    parts = urlsplit(uri)
    # Other schemes, such as file://, have no buckets.
    if parts.scheme not in ("s3", "gs", "gcs", *AZURE):
        return

    def ask() -> bool:
        system, path = open_store(uri)
        system.invalidate_cache()
        return bool(system.exists(path.partition("/")[0]))

    if not retry_transient(uri, ask):
        raise UserError(missing_bucket(uri))


def is_local_uri(uri: str) -> bool:
    """Return whether a URI names a path on this machine's disk."""
    return urlsplit(uri).scheme in ("file", "local")


def open_store(uri: str) -> tuple[Any, str]:
    """Return the client of a store, a file system of fsspec, and the path of a URI in it.

    Every access to a store begins here. fsspec keeps one client per store and process.

    Raises:
        UserError: the URI may hold a secret.
        ImportError, ValueError: no client opens the URI; see :func:`explain_refusal`.
    """
    import fsspec

    require_no_secret(uri)
    scheme = urlsplit(uri).scheme
    system, path = fsspec.url_to_fs(uri, **(_S3_OPTIONS if scheme in ("s3", "s3a") else {}))
    return system, path.rstrip("/")


MANIFEST = "manifest.json"
#: Concurrent transfers of one folder. The transfer of a large file uses several connections.
STREAMS = 4


def is_committed(uri: str) -> bool:
    """Whether the folder's manifest is there, so that all of it is."""
    return object_exists(join_uri(uri, MANIFEST))


def remove_directory(uri: str) -> None:
    """Remove a folder, its manifest first: what is left of a removal cut short counts as nothing.

    Raises:
        UserError: the URI names a bucket rather than a folder in it.
    """
    # A mistyped URI must not delete a complete bucket.
    if not urlsplit(uri).path.strip("/") and not is_local_uri(uri):
        raise UserError(f"{uri}: a whole bucket is not removed")
    remove_file(join_uri(uri, MANIFEST))
    _each(lambda entry: remove_file(join_uri(uri, entry.name)), list_files(uri))
    if is_local_uri(uri):
        shutil.rmtree(urlsplit(uri).path, ignore_errors=True)


def put_directory(
    local: str | os.PathLike[str], uri: str, copies: Mapping[str, str] = MappingProxyType({})
) -> bool:
    """Upload a folder and commit it by its manifest, which is written last.

    A folder with the same manifest and files of the same size is not changed. A folder with another
    manifest is replaced: between the removal of its manifest and the write of the new manifest the
    folder does not exist. Files with known content are not sent again, so an interrupted upload
    resumes.

    Args:
        local: folder with a manifest.
        uri: address of the new folder.
        copies: name -> URI of an object of the same store with the same content, which the store
            copies by itself.

    Returns:
        Whether anything had to be sent.

    Raises:
        UserError: the local folder has no manifest; see also :func:`retry_transient`.
        FileNotFoundError: a local file went away meanwhile.
        StoreUnavailableError: the folder is not committed; do it again later.
    """
    folder = Path(local)
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder} has no {MANIFEST}, so it is not whole and is not uploaded")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST
    )
    there = {entry.name: entry.bytes for entry in list_files(uri)}
    # Read once, so that the manifest that is committed is the one that was compared.
    mine = (folder / MANIFEST).read_bytes()
    if MANIFEST in there:
        sizes = {name: (folder / name).stat().st_size for name in names}
        same = there == sizes | {MANIFEST: len(mine)}
        if same and read_bytes(join_uri(uri, MANIFEST)) == mine:
            return False
        # Readers must never see the old manifest together with new files.
        remove_file(join_uri(uri, MANIFEST))

    def send(name: str) -> None:
        path, target = folder / name, join_uri(uri, name)
        if there.get(name) == path.stat().st_size and _is_there(target, path):
            return
        # An object that went away, or that the store does not copy, is sent.
        with contextlib.suppress(FileNotFoundError, UserError):
            # One that somebody replaced would spoil all copies made of it.
            if name in copies and _is_there(copies[name], path, unknown=True):
                copy_file(copies[name], target)
                return
        put_file(path, target)

    _each(send, names)
    # Leftovers of another upload would become part of the committed folder.
    _each(lambda name: remove_file(join_uri(uri, name)), there.keys() - {*names, MANIFEST})
    # Last: from here on readers accept the folder.
    write_bytes(join_uri(uri, MANIFEST), mine)
    return True


def get_directory(
    uri: str, local: str | os.PathLike[str], check: Callable[[Path], Any] | None = None
) -> Path:
    """Download a committed folder atomically.

    Args:
        uri: address of the folder.
        local: path of the new folder; an existing folder is replaced.
        check: called with the downloaded folder before the rename; raises if it is invalid.

    Raises:
        UserError: the folder is not committed; the disk is full; what ``check`` raises; see also
            :func:`retry_transient`.
    """
    entries = list_files(uri)
    if MANIFEST not in {entry.name for entry in entries}:
        what = f"has no {MANIFEST}: its upload is incomplete" if entries else "does not exist"
        raise UserError(f"{uri} {what}")
    target = Path(local)
    total = sum(entry.bytes for entry in entries)
    # A full disk is reported before the transfer, not near its end.
    local_storage.require_space(target, total)
    with local_storage.staging_directory(target) as aside:

        def fetch(entry: ObjectEntry) -> None:
            # The names come from the store, and their author may be hostile.
            place = (aside / entry.name).resolve()
            if not place.is_relative_to(aside.resolve()):
                raise UserError(f"{uri}: the name {entry.name!r} leads out of the folder")
            try:
                get_file(join_uri(uri, entry.name), place)
            except FileNotFoundError:
                raise UserError(f"{uri}: {entry.name} was removed while it was read") from None

        _each(fetch, entries)
        if check is not None:
            # Before the rename: an invalid folder never appears under its final name.
            check(aside)
    return target


def copy_files(
    source: str,
    target: str,
    names: Iterable[str],
    on_file: Callable[[str], None] | None = None,
) -> None:
    """Copy files of one folder to another folder of the same store.

    Args:
        source: URI of the folder with the files.
        target: URI of the other folder.
        names: file names, relative to their folder.
        on_file: called with the name of each copied file.

    Raises:
        FileNotFoundError: one of them is not there.
        UserError, StoreUnavailableError: see :func:`retry_transient`.
    """

    def copy(name: str) -> None:
        copy_file(join_uri(source, name), join_uri(target, name))
        if on_file is not None:
            on_file(name)

    _each(copy, names)


def _each(action: Callable[[Any], None], items: Iterable[Any]) -> None:
    """Run an action for all items concurrently; the first error ends it."""
    waiting = list(items)
    if len(waiting) < 2:
        for item in waiting:
            action(item)
        return
    with ThreadPoolExecutor(min(STREAMS, len(waiting)), "transfer") as pool:
        tasks = [pool.submit(action, item) for item in waiting]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            # Otherwise the executor starts all waiting transfers before it shows the error.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _is_there(uri: str, local: Path, unknown: bool = False) -> bool:
    """Return whether an object has the bytes of a local file, by the MD5 of the store.

    Args:
        uri: address of the object.
        local: path of the file.
        unknown: result without an MD5 (multipart upload, encryption).
    """
    digest = md5_of(info_of(uri) or {})
    if digest is None:
        return unknown
    with local.open("rb") as stream:
        # Stores report MD5. Here it only saves a transfer and protects against nobody.
        found = hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False))
    return found.digest() == digest
