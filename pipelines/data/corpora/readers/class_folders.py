"""Folders that name splits and classes, for media without metadata."""

from pipelines.data.corpora.readers.fields import (
    MODALITY_OF_EXTENSION,
    file_extension,
    parse_split_name,
)
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError


def find_first_media(source: SourceDirectory) -> str | None:
    """Return the first media file that lies in a folder below the directory, or None."""
    for entry in source.walk(depth=5):
        if "/" in entry.name and file_extension(entry.name) in MODALITY_OF_EXTENSION:
            return entry.name
    return None


def find_split_root(source: SourceDirectory) -> str:
    """Return the folder that holds the split folders, "" for the directory itself.

    Unpacking often puts everything into a single folder; such folders are entered. Without split
    folders the result is "".

    Raises:
        UserError: split folders lie further down, in one of several folders.
    """
    root, folders = "", list[str]()
    for _ in range(3):
        folders = [e.name for e in source.entries(root) if e.is_folder and e.name != "__MACOSX"]
        if any(parse_split_name(name) for name in folders):
            return root
        if len(folders) != 1:
            break
        root = join_path(root, folders[0])
    for name in folders[:3]:
        inside = [e.name for e in source.entries(join_path(root, name)) if e.is_folder]
        named = [each for each in inside if parse_split_name(each)]
        if len({parse_split_name(each) for each in named}) > 1:
            here = join_path(root, name)
            raise UserError(
                f"{source.uri}: {here}/{named[0]} and {here}/{named[1]} name splits, but other "
                f"folders do not. Give the folder {here}; or sort the files as "
                f"{named[0]}/CLASS/… and {named[1]}/CLASS/…"
            )
    return ""


def join_path(folder: str, name: str) -> str:
    """Return the path of a name in a folder; "" is the directory itself."""
    return f"{folder}/{name}" if folder else name
