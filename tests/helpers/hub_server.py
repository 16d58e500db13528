"""Server with the HTTP interface of the Hugging Face Hub: create, commit, list, download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class HubServer(ThreadingHTTPServer):
    """Hub in memory.

    Its ``repositories`` are name -> file -> content, and ``requests`` the lines of all requests.
    The files of a further revision are those of the name ``owner/name@revision``. A data set has
    the name ``datasets/owner/name``. ``sent`` has the bytes of each answer with content of a file.
    Repositories in ``private`` need the token ``hf_test``.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []
        self.sent: list[int] = []
        self.private: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def variables(self, home: Path) -> dict[str, str]:
        """Return the environment variables of a client whose cache is below ``home``."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    COMMIT = "c" * 40

    def do_POST(self) -> None:
        path = self._path()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/repos/create":
            values = json.loads(body)
            owner = values.get("organization") or "owner"
            name = f"{owner}/{values['name'].rpartition('/')[2]}"
            self.server.repositories.setdefault(name, {})
            self._answer({"url": f"{self.server.url}/{name}"})
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/paths-info/" in path:
            name, revision, _ = _parse_api(path)
            wanted = json.loads(body)["paths"]
            listed = _list_tree(self._files(name, revision) or {}, "", True)
            self._answer([each for each in listed if each["path"] in wanted])
        elif "/preupload/" in path:
            files = [
                {"path": each["path"], "uploadMode": "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            name = path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in filter(None, body.split(b"\n")):
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.server.repositories[name][entry["value"]["path"]] = content
            url = f"{self.server.url}/{name}/commit/{self.COMMIT}"
            self._answer({"commitUrl": url, "commitOid": self.COMMIT})

    def do_GET(self) -> None:
        path = self._path()
        if path.startswith(("/api/models/", "/api/datasets/")):
            name, revision, folder = _parse_api(path)
            files = self._files(name, revision)
            if files is None:
                is_known = name in self.server.repositories and self._is_allowed(name)
                code = "RevisionNotFound" if is_known else "RepoNotFound"
                self._answer({"error": "Not found"}, 404, code)
            elif "/tree/" in path:
                listed = _list_tree(files, folder, "recursive=true" in self.path.lower())
                if listed or not folder:
                    self._answer(listed)
                else:
                    self._answer({"error": "Not found"}, 404, "EntryNotFound")
            else:
                siblings = [{"rfilename": file} for file in files]
                self._answer({"id": name, "sha": self._commit(revision), "siblings": siblings})
            return
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        files = self._files(name, revision)
        if files is None or file not in files:
            self._answer({"error": "Not found"}, 404, "EntryNotFound")
            return
        data, status = files[file], 200
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": self._commit(revision)}
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[int(first) : int(last or len(data)) + 1], 206
        if self.command == "GET":
            self.server.sent.append(len(data))
        self._send(data, status, headers)

    do_HEAD = do_GET

    def _commit(self, revision: str) -> str:
        return self.COMMIT if revision in ("main", self.COMMIT) else _digest(revision.encode())

    def _is_allowed(self, name: str) -> bool:
        is_open = name not in self.server.private
        return is_open or self.headers.get("Authorization") == "Bearer hf_test"

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        known = self.server.repositories
        if not self._is_allowed(name):
            return None
        if revision in ("main", self.COMMIT):
            return known.get(name)
        tagged = {
            key: files
            for key, files in known.items()
            if key.startswith(f"{name}@")
            and revision in (key.partition("@")[2], self._commit(key.partition("@")[2]))
        }
        return next(iter(tagged.values()), None)

    def _path(self) -> str:
        self.server.requests.append(f"{self.command} {self.path}")
        return unquote(urlsplit(self.path).path)

    def _answer(self, value: Any, status: int = 200, code: str = "") -> None:
        headers = {"Content-Type": "application/json", "X-Error-Code": code}
        self._send(json.dumps(value).encode(), status, headers)

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None: ...


def _parse_api(path: str) -> tuple[str, str, str]:
    """Return (repository, revision, path in it) of a request about a repository."""
    kind, *parts = path.removeprefix("/api/").split("/")
    prefix = "" if kind == "models" else f"{kind}/"
    revision = parts[3] if len(parts) > 3 else "main"
    return f"{prefix}{parts[0]}/{parts[1]}", revision, "/".join(parts[4:])


def _list_tree(files: dict[str, bytes], folder: str, is_deep: bool) -> list[dict[str, Any]]:
    """Return the files and folders in a folder, or all below it."""
    found: dict[str, dict[str, Any]] = {}
    start = f"{folder}/" if folder else ""
    for file, data in files.items():
        inside = file.removeprefix(start)
        if not file.startswith(start):
            continue
        parts = inside.split("/")
        for depth in range(1, len(parts) if is_deep else min(len(parts), 2)):
            path = start + "/".join(parts[:depth])
            found[path] = {"type": "directory", "path": path, "size": 0, "oid": "d" * 40}
        if is_deep or len(parts) == 1:
            found[file] = {"type": "file", "path": file, "size": len(data), "oid": _digest(data)}
    return [*found.values()]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:40]


@contextmanager
def serve_hub() -> Iterator[HubServer]:
    """Serve an empty Hub on loopback."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
