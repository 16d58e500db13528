"""Files of a repository of the Hugging Face Hub, by split.

README.md  data/train-00000-of-00002.parquet  data/test-00000-of-00001.parquet
README.md  english/train-00000-of-00001.parquet   the folder is one of several configurations
default/train/0000.parquet                        as the Hub converts other formats
"""

import re
from collections.abc import Iterator
from itertools import islice

from pipelines.corpora.readers.fields import parse_split_name, parse_split_prefix
from pipelines.io.directory import SourceDirectory
from skillnet_platform.errors import UserError

#: Files that show that a directory is a repository, so that its folders are searched.
REPOSITORY_FILES = (".gitattributes", "README.md", "dataset_infos.json")
#: The usual folder of the files.
DATA_FOLDER = "data"
#: Folders that are searched, in the order of their names, and their levels.
MAX_SEARCHED_FOLDERS, SEARCHED_LEVELS = 64, 2
#: Configurations that a message names.
MAX_NAMED = 8
#: ``train-00000-of-00002`` and the longer names of old repositories, which end in a hash.
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(-[0-9a-f]{8,64})?")
#: ``0000`` in a folder that names the split.
_NUMBER = re.compile(r"\d{1,6}")


def list_repository_files(
    source: SourceDirectory, suffixes: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Return (split, file) of the files of rows in a repository, none in another directory.

    A split of another name than train, validation or test keeps its name.

    Args:
        source: the directory of the repository, or of one of its configurations.
        suffixes: endings of files of rows.

    Raises:
        UserError: the repository has several configurations.
    """
    if source.is_file:
        return []
    is_repository = any(source.exists(name) for name in REPOSITORY_FILES)
    configurations: dict[str, list[tuple[str, str]]] = {}
    for folder in _iter_folders(source, "" if is_repository else DATA_FOLDER):
        if files := _list_shards(source, folder, suffixes):
            configurations[folder] = files
    if len(configurations) > 1:
        names = list(configurations)
        more = " …" if len(names) > MAX_NAMED else ""
        raise UserError(
            f"{source.uri}: several configurations: {', '.join(names[:MAX_NAMED])}{more}. Give "
            f"one of them: {source.path(names[0])}"
        )
    return _name_splits(next(iter(configurations.values()), []))


def _iter_folders(source: SourceDirectory, start: str) -> Iterator[str]:
    """Yield the directory itself, and the folders below ``start`` that can be configurations."""
    yield ""
    if start and not source.exists(start):
        return
    for folder in islice(source.folders(start, SEARCHED_LEVELS), MAX_SEARCHED_FOLDERS):
        # A split folder belongs to the configuration above it.
        if folder and not parse_split_name(folder.rpartition("/")[2]):
            yield folder


def _list_shards(
    source: SourceDirectory, folder: str, suffixes: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Return (name of the split, file) of the shards in a folder and in its split folders."""
    found = []
    for entry in source.entries(folder):
        path = f"{folder}/{entry.name}" if folder else entry.name
        if not entry.is_folder:
            stem = _remove_suffix(entry.name, suffixes)
            shard = _SHARD.fullmatch(stem)
            if shard:
                found.append((shard["split"], path))
            # In the directory itself such a file is metadata of media beside it.
            elif stem and folder and parse_split_name(stem):
                found.append((stem, path))
        elif parse_split_name(entry.name):
            found += [(entry.name, file) for file in _list_numbered(source, path, suffixes)]
    return found


def _list_numbered(
    source: SourceDirectory, folder: str, suffixes: tuple[str, ...]
) -> Iterator[str]:
    for entry in source.entries(folder):
        stem = "" if entry.is_folder else _remove_suffix(entry.name, suffixes)
        if _NUMBER.fullmatch(stem) or _SHARD.fullmatch(stem):
            yield f"{folder}/{entry.name}"


def _remove_suffix(name: str, suffixes: tuple[str, ...]) -> str:
    """Return the name of a file of rows without its ending, "" for another file."""
    ending = next((each for each in suffixes if name.lower().endswith(each)), "")
    return name[: -len(ending)] if ending else ""


def _name_splits(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Replace the names of splits by train, validation and test where they mean these."""
    has_train = any(parse_split_name(name) == "train" for name, _ in found)
    # "train.clean.100" means a part of the training rows, unless "train" itself occurs.
    parse = parse_split_name if has_train else parse_split_prefix
    return [(parse(name) or name, file) for name, file in found]
