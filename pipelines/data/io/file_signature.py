"""Format and modality of media by their first bytes."""

from skillnet.modality import list_modalities


def find_signature(data: bytes) -> tuple[str, str] | None:
    """Return (modality, format) of a media file, or None if its first bytes are unknown.

    Args:
        data: its first 16 bytes, or more.
    """
    for modality in list_modalities():
        for signature in modality.signatures:
            if signature.matches(data):
                return modality.name, signature.format
    return None


def describe_bytes(data: bytes) -> str:
    """Return the size of a file and its format if known, as ``"4,364 bytes, JPEG"``."""
    found = find_signature(data)
    return f"{len(data):,} bytes, {found[1]}" if found else f"{len(data):,} bytes"
