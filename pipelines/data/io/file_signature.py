"""Format and modality of media by their first bytes."""

#: (First bytes, offset of the next bytes, these bytes, modality, format).
_SIGNATURES = (
    (b"\xff\xd8\xff", 0, b"", "image", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", 0, b"", "image", "PNG"),
    (b"GIF8", 0, b"", "image", "GIF"),
    (b"BM", 6, bytes(4), "image", "BMP"),
    (b"II*\0", 0, b"", "image", "TIFF"),
    (b"MM\0*", 0, b"", "image", "TIFF"),
    (b"RIFF", 8, b"WEBP", "image", "WebP"),
    (b"", 4, b"ftypavi", "image", "AVIF"),
    (b"RIFF", 8, b"WAVE", "sound", "WAV"),
    (b"FORM", 8, b"AIF", "sound", "AIFF"),
    (b"fLaC", 0, b"", "sound", "FLAC"),
    (b"OggS", 0, b"", "sound", "Ogg"),
    (b"ID3", 0, b"", "sound", "MP3"),
    (b"\xff\xfb", 0, b"", "sound", "MP3"),
    (b"\xff\xf3", 0, b"", "sound", "MP3"),
    (b"\xff\xf2", 0, b"", "sound", "MP3"),
    (b"#!AMR", 0, b"", "sound", "AMR"),
    (b"", 4, b"ftypM4A", "sound", "M4A"),
    (b"", 4, b"ftypqt", "video", "MOV"),
    (b"", 4, b"ftyp", "video", "MP4"),
    (b"RIFF", 8, b"AVI ", "video", "AVI"),
    (b"\x1aE\xdf\xa3", 0, b"", "video", "Matroska or WebM"),
)


def find_signature(data: bytes) -> tuple[str, str] | None:
    """Return (modality, format) of a media file, or None if its first bytes are unknown.

    Args:
        data: its first 16 bytes, or more.
    """
    for first, offset, following, modality, name in _SIGNATURES:
        if data.startswith(first) and data.startswith(following, offset):
            return modality, name
    return None


def describe_bytes(data: bytes) -> str:
    """Return the size of a file and its format if known, as ``"4,364 bytes, JPEG"``."""
    found = find_signature(data)
    return f"{len(data):,} bytes, {found[1]}" if found else f"{len(data):,} bytes"
