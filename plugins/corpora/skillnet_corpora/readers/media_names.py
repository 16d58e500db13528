"""Media files by name, for rows that name them in an unusual field or without their ending.

``{"id": "00001"}`` can mean ``train/00001.jpg``. :class:`MediaNames` finds the file of a value, and
the field that names files. Readers of rows call it before they take rows with media for texts.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from pipelines.data.corpora.base import Row
from pipelines.data.io.directory import SourceDirectory
from skillnet.modality import is_string_modality
from skillnet_corpora.readers.fields import (
    MODALITY_OF_EXTENSION,
    file_extension,
    parse_split_name,
)
from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Files that are listed to find out whether media lie beside rows.
LISTED_FILES = 100_000
#: Media beside this many times as many rows are an illustration, such as a logo.
ROWS_PER_ILLUSTRATION = 10


class MediaNames:
    """Media files of a directory by the last part of their names, without the ending.

    Memory grows with the number of media files, by their names.

    Args:
        media: the directory.
        limit: files that are listed, None for all.
        depth: levels of folders that are listed.

    Attributes:
        count: number of media files.
    """

    def __init__(self, media: SourceDirectory, limit: int | None = None, depth: int = 16) -> None:
        self.count = 0
        self._files = defaultdict[str, list[str]](list)
        for entry in islice(media.walk(depth=depth), limit):
            if file_extension(entry.name) in MODALITY_OF_EXTENSION:
                self._files[_remove_ending(entry.name.rpartition("/")[2])].append(entry.name)
                self.count += 1

    @property
    def first(self) -> str:
        """The path of a media file."""
        return next(iter(self._files.values()))[0]

    def find(self, value: Any, split: str | None = None) -> list[str]:
        """Return the media files that a value can name, by the end of their paths.

        Args:
            value: a path or its end, with or without the ending of the file.
            split: split of the row; it decides between files whose folders name splits.
        """
        is_name = isinstance(value, str | int) and not isinstance(value, bool)
        name = str(value).strip().removeprefix("./") if is_name else ""
        last = name.rpartition("/")[2]
        if not last:
            return []
        whole = [f for f in self._files.get(_remove_ending(last), ()) if _ends_with(f, name)]
        stems = [f for f in self._files.get(last, ()) if _ends_with(_remove_ending(f), name)]
        found = list(dict.fromkeys(whole or stems))
        exact = [file for file in found if name in (file, _remove_ending(file))]
        of_split = [file for file in found if split and split in _folder_splits(file)]
        return (exact if len(exact) == 1 else of_split) or found

    def choose(self, value: Any, split: str | None) -> str:
        """Return the media file that a value names.

        Raises:
            ValueError: no file or several files have the name; the text is the reason.
        """
        found = self.find(value, split)
        if len(found) != 1:
            raise ValueError(
                "several media files of this name" if found else "no media file of this name"
            )
        return found[0]

    def find_field(self, rows: Iterable[Row]) -> tuple[str, Any, str] | None:
        """Return (field, a value, its file) of the field that names most media, or None.

        Args:
            rows: some rows. A value can be a list of names.
        """
        named, seen = defaultdict[str, list[tuple[Any, str]]](list), Counter[str]()
        for row in rows:
            for field, value in row.items():
                seen[field] += 1
                first = value[0] if isinstance(value, list) and value else value
                if files := self.find(first):
                    named[field].append((value, files[0]))
        # A label or a word can be the name of a file by chance: most different files win.
        fields = [field for field, each in named.items() if 2 * len(each) > seen[field]]
        if not fields:
            return None
        field = max(fields, key=lambda field: len({file for _, file in named[field]}))
        return field, *named[field][0]


def ask_for_media(
    source: SourceDirectory,
    media: SourceDirectory,
    rows: Sequence[Row],
    num_rows: int,
    option: str,
    modality: str | None,
) -> None:
    """Refuse rows that would be read as texts although media lie beside them.

    Args:
        source: the directory of the rows, or their file.
        media: directory of the media.
        rows: some rows, none of which names a media file in a usual field.
        num_rows: number of rows that were sampled.
        option: start of the options, such as ``--options.mine``.
        modality: the modality that the user chose.

    Raises:
        UserError: a field names media, or there are many media; the message has the options.
    """
    # The folder of a single file can be a home directory or a bucket.
    depth = (1 if source.remote else 2) if source.is_file else 16
    names = MediaNames(media, LISTED_FILES, depth)
    if not names.count:
        return
    is_one = names.count == 1
    files = "1 media file" if is_one else f"{names.count:,} media files"
    unread = f"{source.uri}: {files} {'is' if is_one else 'are'} not read (such as {names.first})"
    is_text = is_string_modality(modality)
    found = names.find_field(rows)
    if is_text or (source.is_file and found is None):
        # Beside a single file anything can lie; its folder was not given.
        if not source.is_file:
            console.print_warning(unread)
        return
    alone = f"To read the rows as texts without them: {option}.modality text"
    lie = f"{source.uri}: {files} {'lies' if is_one else 'lie'} beside the rows"
    if found is not None:
        field, value, file = found
        if isinstance(value, list):
            raise UserError(
                f"{lie}, and the field {field} names several in a row. Write one row per media "
                f"file, with its name in the field file_name. {alone}"
            )
        raise UserError(
            f"{lie}, and the field {field} names them ({value}: {file}). To read them: "
            f"{option}.file {field}. {alone}"
        )
    if names.count * ROWS_PER_ILLUSTRATION < num_rows:
        console.print_warning(unread)
        return
    fields = list(dict.fromkeys(name for row in rows for name in row))
    raise UserError(
        f"{lie} (such as {names.first}), and no field names them among {', '.join(fields)}. Write "
        f"their names into a field, and give it: {option}.file FIELD. {alone}"
    )


def _ends_with(path: str, name: str) -> bool:
    return f"/{path}".endswith(f"/{name}")


def _remove_ending(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.rpartition('.')[0] or last}"


def _folder_splits(file: str) -> set[str | None]:
    return {parse_split_name(part) for part in file.split("/")[:-1]}
