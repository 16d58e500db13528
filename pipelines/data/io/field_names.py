"""Names of the fields of rows that mean media files, for every reader of rows."""

#: Names of a field with the name of a media file, or with the media itself, the usual one first.
FILE_FIELDS = (
    "file_name", "file", "filename", "path", "audio", "image", "video", "wav", "image_name",
)  # fmt: skip


def fold_name(name: str) -> str:
    """Return the name of a field without surrounding blanks, in small letters."""
    return name.strip().casefold()
