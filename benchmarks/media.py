"""Media for benchmarks: the corpora of ``media_corpus``, made small where there are none.

``SKILLNET_BENCHMARK_MEDIA`` names a folder with image/, sound/ and video/ in it.
"""

import os
from pathlib import Path

from benchmarks.media_corpus import ENDING, make
from pipelines.data.transforms import image, sound, video
from skillnet_platform import console, storage

#: Side of pictures, frames of a recording, side of a clip's frames.
PICTURE, FRAMES, CLIP = 224, 1_200, 96


def files(kind: str, rows: int) -> list[Path]:
    """Return paths of a number of media files of a kind."""
    root = Path(os.environ.get("SKILLNET_BENCHMARK_MEDIA") or storage.run_root() / "media")
    folder = root / kind
    found = sorted(folder.glob(f"*/*.{ENDING[kind]}"))[:rows]
    if len(found) < rows:
        console.print_note(f"making {rows} rows of {kind} in {folder}")
        make(folder, kind, rows, storage.archive_root())
        found = sorted(folder.glob(f"*/*.{ENDING[kind]}"))[:rows]
    return found


def decode(kind: str, data: bytes):  # type: ignore[no-untyped-def]
    """A file's bytes to the array that a model reads."""
    if kind == "image":
        return image.load_pixels(data, PICTURE, "crop")
    if kind == "sound":
        return sound.load_log_mel(data, FRAMES, False)
    return video.load_video_frames(data, 8, CLIP)
