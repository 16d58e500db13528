"""Files of sound and moving pictures, opened by FFmpeg: those people have, and nothing beside them.

FFmpeg also opens playlists, which name other files, descriptions of streams, which open ports of
this machine, pictures, subtitles and hundreds of formats of games. Whoever made a file decides by
its content which of them reads it, whatever its name is.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

#: FFmpeg's names of what is opened: containers, then recordings and clips without one.
FORMATS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "ogg", "asf", "flv", "rm", "mxf", "gif", "ivf"),
    *("mp3", "wav", "w64", "aiff", "caf", "au", "voc", "nistsphere", "flac", "aac", "ac3", "eac3"),
    *("amr", "amrnb", "amrwb", "wv", "ape", "tta", "dts"),
    *("mpegvideo", "m4v", "h263", "h264", "hevc", "obu", "av1", "dv", "mjpeg", "yuv4mpegpipe"),
)
#: No protocol has that name: the bytes are at hand, and a file that asks for more gets none.
_LIMITS = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "none"}
UNSUPPORTED_FORMAT = "a playlist, a picture or another format that is not read as sound or video"
UNKNOWN_CODEC = "a codec that FFmpeg does not know"


@contextlib.contextmanager
def open_container(data: bytes, **options: str) -> Iterator[Any]:
    """PyAV's container of a file's bytes.

    Args:
        data: the file.
        options: of FFmpeg's.

    Raises:
        ValueError: it is of none of ``FORMATS``.
        av.FFmpegError: it cannot be read.
    """
    import av

    try:
        container = av.open(
            io.BytesIO(data), "r", metadata_errors="ignore", options=_LIMITS | options
        )
    except av.ArgumentError:  # what FFmpeg says of formats that are not on its list
        raise ValueError(UNSUPPORTED_FORMAT) from None
    with container:
        yield container


def first_stream(streams: Any, missing: str) -> Any:
    """The first of PyAV's streams of a kind; the picture on a record's cover is none.

    Raises:
        ValueError: there is none, with ``missing`` as its text, or its codec is not known.
    """
    from av.stream import Disposition

    for stream in streams:
        if not stream.disposition & Disposition.attached_pic:
            if stream.codec_context is None:
                raise ValueError(UNKNOWN_CODEC)
            return stream
    raise ValueError(missing)
