"""Audio and video files, opened by FFmpeg within an allow-list of formats.

FFmpeg also opens playlists, which name other files; stream descriptions, which open network ports;
and images, subtitles and hundreds of game formats. The content of a file selects the format, and
not its name, so the author of a file could select any of them.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

#: FFmpeg's names of allowed formats: containers, then audio and video without a container.
FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "ogg", "asf", "flv", "rm", "mxf", "gif", "ivf"),
    *("mp3", "wav", "w64", "aiff", "caf", "au", "voc", "nistsphere", "flac", "aac", "ac3", "eac3"),
    *("amr", "amrnb", "amrwb", "wv", "ape", "tta", "dts"),
    *("mpegvideo", "m4v", "h263", "h264", "hevc", "obu", "av1", "dv", "mjpeg", "yuv4mpegpipe"),
)
#: No protocol has the name "none": the bytes are in memory, and references to files fail.
_LIMITS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
UNSUPPORTED_FORMAT = "a playlist, an image or another format that is not read as audio or video"
UNKNOWN_CODEC = "a codec that FFmpeg does not know"


@contextlib.contextmanager
def open_container(data: bytes, **options: str) -> Iterator[Any]:
    """Open the bytes of a file as a PyAV container.

    Args:
        data: bytes of the file.
        options: options of FFmpeg.

    Raises:
        ValueError: the format is not in ``FORMATS``.
        av.FFmpegError: the file cannot be read.
    """
    import av

    # Titles that are not UTF-8 are no reason to refuse a file. PyAV 19 has no such argument and
    # reads them; it needs Python 3.12, so both versions are in use.
    lenient: dict[str, Any] = {}
    if int(av.__version__.partition(".")[0]) < 19:
        lenient["metadata_errors"] = "ignore"
    try:
        container = av.open(io.BytesIO(data), "r", options=_LIMITS | options, **lenient)
    except av.ArgumentError:  # FFmpeg's error for formats that are not on the list
        raise ValueError(UNSUPPORTED_FORMAT) from None
    with container:
        yield container


def first_stream(streams: Any, missing: str) -> Any:
    """Return the first stream that is not a cover image.

    Args:
        streams: PyAV streams of one kind.
        missing: message if there is no stream.

    Raises:
        ValueError: there is no stream, or its codec is unknown.
    """
    from av.stream import Disposition

    for stream in streams:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise ValueError(UNKNOWN_CODEC)
            return stream
    raise ValueError(missing)


def measure_seconds(data: bytes) -> dict[str, float]:
    """Return the seconds that the header of a file declares.

    Raises:
        ValueError: the file cannot be read.
    """
    import av

    try:
        with open_container(data) as container:
            return {"seconds": (container.duration or 0) / av.time_base}
    except av.FFmpegError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None
