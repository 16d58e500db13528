"""Archives made of a few files, for tests. Equal files give equal bytes."""

import gzip
import io
import lzma
import tarfile
import zipfile


def zipped(files: dict[str, bytes]) -> bytes:
    """A zip archive of those files."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        for name, data in files.items():
            # A ZipInfo made by hand is dated 1980.
            out.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return target.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    """A compressed tar archive of those files."""
    return gzip.compress(_tar(files), mtime=0)


def packaged(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """A Debian package of those files and symbolic links, without its control files."""
    content = lzma.compress(_tar(files, links))
    members = {"debian-binary": b"2.0\n", "data.tar.xz": content}
    parts = [b"!<arch>\n"]
    for name, data in members.items():
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n"
        parts += [head.encode(), data, b"\n" * (len(data) % 2)]
    return b"".join(parts)


def _tar(files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as out:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
        for name, target_name in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target_name
            out.addfile(entry)
    return target.getvalue()
