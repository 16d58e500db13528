"""Archives made of a few files, for tests. Equal files give equal bytes."""

import gzip
import io
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
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as out:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return gzip.compress(target.getvalue(), mtime=0)
