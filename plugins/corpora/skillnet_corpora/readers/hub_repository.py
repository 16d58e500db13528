"""Files of a repository of the Hugging Face Hub, by split.

README.md  data/train-00000-of-00002.parquet  data/test-00000-of-00001.parquet
README.md  english/train-00000-of-00001.parquet   the folder is one of several configurations
default/train/0000.parquet                        as the Hub converts other formats

README.md can list the files of each configuration, and name classes; see :func:`read_card`.
:func:`find_stated_files` and :func:`list_repository_files` return the files of one configuration.
:func:`require_all_shards` finds the shards that are missing.

The header of ``README.md``, between two lines ``---``, is YAML::

    configs:
    - config_name: zh
      data_files: [{split: train, path: "zh/train-*.parquet"}, {split: test, path: zh/test.parquet}]
    dataset_info:
      features: [{name: label, dtype: {class_label: {names: {"0": bad, "1": good}}}}]

:func:`read_card` reads it, and ``dataset_infos.json`` of older repositories. Both are not trusted:
only plain values are read, and patterns only select files of the directory. Scripts never run.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import islice
from typing import Any

from pipelines.data.io.directory import SourceDirectory
from skillnet_corpora.readers.class_names import NO_CLASSES, FileClasses
from skillnet_corpora.readers.fields import (
    MODALITY_OF_EXTENSION,
    file_extension,
    parse_split_name,
    parse_split_prefix,
)
from skillnet_corpora.readers.parquet_media import describe_features
from skillnet_platform.config.safe_yaml import MAX_CHARACTERS, load_plain_yaml
from skillnet_platform.errors import UserError, suggest_name

CARD, LEGACY_CARD = "README.md", "dataset_infos.json"
#: Name of a configuration that has none, and of the one that the Hub prefers.
DEFAULT = "default"
#: Keys of the header that are read.
_KEYS = ("configs", "dataset_info")
_FENCE = "---"


@dataclass(frozen=True)
class StatedConfiguration:
    """Files of a configuration, as the header lists them.

    Attributes:
        name: configuration, as the header calls it.
        patterns: (split, pattern of paths in the repository); () if the names of files decide.
        folder: folder of its files, "" for the repository.
        is_default: whether it is the one to read if nobody chooses.
    """

    name: str
    patterns: tuple[tuple[str, str], ...] = ()
    folder: str = ""
    is_default: bool = False


@dataclass(frozen=True)
class RepositoryCard:
    """Configurations of a repository, and the classes and splits of each.

    Attributes:
        configurations: those whose files are listed.
        classes: configuration -> columns of classes.
        splits: configuration -> names of its splits.
    """

    configurations: tuple[StatedConfiguration, ...] = ()
    classes: Mapping[str, FileClasses] = field(default_factory=dict)
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_card(source: SourceDirectory) -> RepositoryCard:
    """Return the statements of a repository about its files; none for another directory.

    Raises:
        UserError: the header has configurations or features that cannot be read.
    """
    if source.is_file:
        return RepositoryCard()
    path = source.path(CARD)
    header = _read_header(source)
    configurations = tuple(_parse_configurations(path, header.get("configs")))
    infos = header.get("dataset_info")
    infos = infos if isinstance(infos, list) else [infos]
    classes, splits = _read_legacy(source), dict[str, tuple[str, ...]]()
    for info in infos:
        if isinstance(info, dict):
            name = str(info.get("config_name") or DEFAULT)
            names = dict(_parse_classes(path, info.get("features")))
            if names or name not in classes:
                classes[name] = FileClasses(path, names)
            listed = info.get("splits")
            listed = listed if isinstance(listed, list) else []
            named = [each.get("name") for each in listed if isinstance(each, dict)]
            splits[name] = tuple(str(each) for each in named if each)
    return RepositoryCard(configurations, classes, splits)


def _read_header(source: SourceDirectory) -> dict[str, Any]:
    """Return the header of README.md; {} without one that states files or features."""
    if not source.exists(CARD):
        return {}
    with source.open(CARD) as stream:
        # A character has at most four bytes.
        text = stream.read(4 * MAX_CHARACTERS).decode("utf-8-sig", "replace")
    first, *lines = text.splitlines() or [""]
    if first.rstrip() != _FENCE:
        return {}
    end = next((n for n, line in enumerate(lines) if line.rstrip() == _FENCE), None)
    header = lines[:end]
    if not any(line.startswith(_KEYS) for line in header):
        return {}
    try:
        if end is None:
            raise ValueError(f"no line {_FENCE} ends it")
        value = load_plain_yaml("\n".join(header))
    except ValueError as error:
        raise _card_error(source.path(CARD), str(error)) from None
    return value if isinstance(value, dict) else {}


def _parse_configurations(path: str, configs: Any) -> Iterator[StatedConfiguration]:
    for config in configs if isinstance(configs, list) else [configs]:
        if not isinstance(config, dict):
            if config is not None:
                raise _card_error(path, "configs is not a list of configurations")
            continue
        name = str(config.get("config_name") or DEFAULT)
        folder = config.get("data_dir") or ""
        if not isinstance(folder, str):
            raise _card_error(path, f"data_dir of {name} is not a folder")
        folder = _clean_path(path, folder)
        patterns = tuple(
            (split, "/".join(filter(None, (folder, _clean_path(path, pattern)))))
            for split, pattern in _parse_files(path, name, config.get("data_files"))
        )
        if patterns or folder:
            is_default = config.get("default") is True or name == DEFAULT
            yield StatedConfiguration(name, patterns, folder, is_default)


def _parse_files(path: str, name: str, files: Any) -> Iterator[tuple[str, str]]:
    """Yield (split, pattern) of the forms of ``data_files``: a path, a list, or splits."""
    if isinstance(files, dict):
        files = [{"split": split, "path": paths} for split, paths in files.items()]
    for each in files if isinstance(files, list) else [files] if files else []:
        split, paths = "train", each
        if isinstance(each, dict):
            split, paths = str(each.get("split") or "train"), each.get("path")
        for pattern in paths if isinstance(paths, list) else [paths]:
            if not isinstance(pattern, str) or not pattern:
                raise _card_error(path, f"data_files of {name} are not paths by split")
            yield split, pattern


def _clean_path(path: str, stated: str) -> str:
    """Return a path of the header without empty parts; it stays in the repository."""
    parts = [part for part in stated.split("/") if part not in ("", ".")]
    if stated.startswith("/") or "://" in stated or ".." in parts:
        raise _card_error(path, f"{stated!r} is not a path in the repository")
    return "/".join(parts)


def _parse_classes(path: str, features: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield (column, names of its classes) of the features of a header."""
    for feature in features if isinstance(features, list) else ():
        if not isinstance(feature, dict):
            continue
        column, kind = feature.get("name"), feature.get("dtype")
        for key in ("sequence", "list", "large_list"):
            kind = kind or feature.get(key)
        while isinstance(kind, dict) and "class_label" not in kind:
            kind = kind.get("dtype") or kind.get("sequence") or kind.get("list")
        label = kind.get("class_label") if isinstance(kind, dict) else None
        names = label.get("names") if isinstance(label, dict) else None
        if isinstance(names, dict):
            numbers = sorted(names, key=lambda each: (len(each), each))
            if numbers != [str(number) for number in range(len(numbers))]:
                raise _card_error(path, f"the classes of {column} are not numbered 0, 1, 2 …")
            names = [names[number] for number in numbers]
        if isinstance(column, str) and isinstance(names, list) and names:
            yield column, tuple(str(name) for name in names)


def _read_legacy(source: SourceDirectory) -> dict[str, FileClasses]:
    """Return configuration -> its classes in ``dataset_infos.json``; {} if it is damaged."""
    if not source.exists(LEGACY_CARD):
        return {}
    with source.open(LEGACY_CARD) as stream:
        data = stream.read(4 * MAX_CHARACTERS + 1)
    try:
        infos = json.loads(data)
    except (ValueError, RecursionError):
        infos = None
    path = source.path(LEGACY_CARD)
    return {
        str(name): FileClasses(path, describe_features(info.get("features")).class_names)
        for name, info in (infos.items() if isinstance(infos, dict) else ())
        if isinstance(info, dict)
    }


def _card_error(path: str, problem: str) -> UserError:
    return UserError(
        f"{path}: its header states the files or classes of the rows, and cannot be read: "
        f"{problem}. Correct the header, or move the file away to go by the names of the files"
    )


def match_pattern(pattern: str, file: str) -> bool:
    """Return whether a path matches a pattern, in which ``**`` stands for any folders.

    Args:
        pattern: pattern of a path, as in ``glob``.
        file: path of a file, with slashes.
    """
    parts = file.split("/")
    # Positions that the pattern can have reached: linear in the path, however many ** there are.
    reached = {0}
    for part in pattern.split("/"):
        if part == "**":
            reached = set(range(min(reached), len(parts) + 1)) if reached else reached
        else:
            inside = (n for n in reached if n < len(parts))
            reached = {n + 1 for n in inside if fnmatchcase(parts[n], part)}
    return len(parts) in reached


#: Files that show that a directory is a repository, so that its folders are searched.
REPOSITORY_FILES = (".gitattributes", "README.md", "dataset_infos.json")
#: The usual folder of the files.
DATA_FOLDER = "data"
#: Folders that are searched, in the order of their names, and their levels.
MAX_SEARCHED_FOLDERS, SEARCHED_LEVELS = 64, 2
#: Configurations, or missing files, that a message names.
MAX_NAMED = 8
#: ``train-00000-of-00002`` and the longer names of old repositories, which end in a hash.
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5,6})-of-(?P<total>\d{5,6})(-[0-9a-f]{8,64})?")
#: A part of a set of files: everything before its number, number, total, and its ending.
_PART = re.compile(r"(.*?[-._]?)(\d{5,6})-of-(\d{5,6})(?:-[0-9a-f]{8,64})?(\.[^/]*)?")
#: ``0000`` in a folder that names the split.
_NUMBER = re.compile(r"\d{1,6}")


class SeveralConfigurationsError(UserError):
    """A repository has several configurations, and nobody chose one.

    Args:
        uri: path or URI of the repository.
        names: names of the configurations.
    """

    def __init__(self, uri: str, names: list[str]) -> None:
        self.uri, self.names = uri, names
        more = " …" if len(names) > MAX_NAMED else ""
        self.listed = f"{', '.join(names[:MAX_NAMED])}{more}"
        super().__init__(f"{uri}: several configurations: {self.listed}")


def find_stated_files(
    source: SourceDirectory,
    card: RepositoryCard,
    suffixes: tuple[str, ...],
    wanted: str | None,
    warn: Callable[[str], None],
) -> tuple[str, list[tuple[str | None, str]]]:
    """Return (configuration, its (split, file)) that README.md lists; none if it lists no rows.

    The split is None if nothing names it.

    Args:
        source: the directory of the repository.
        card: statements of its README.md.
        suffixes: endings of files of rows.
        wanted: name of the configuration, None for the only or the default one.
        warn: prints a warning.

    Raises:
        SeveralConfigurationsError: nothing decides between several configurations.
        UserError: there is no such configuration, or a listed file is missing.
    """
    stated = {each.name: each for each in card.configurations}
    if not stated:
        return DEFAULT, []
    if wanted is not None and wanted not in stated:
        raise UserError(
            f"{source.path(CARD)}: no configuration {wanted!r}{suggest_name(wanted, stated)}"
        )
    defaults = [each.name for each in stated.values() if each.is_default]
    name = wanted or (next(iter(stated)) if len(stated) == 1 else None)
    if name is None:
        if len(defaults) != 1:
            raise SeveralConfigurationsError(source.uri, list(stated))
        name = defaults[0]
        others = ", ".join([each for each in stated if each != name][:MAX_NAMED])
        warn(
            f"{source.uri}: reads {name}, the default of several configurations. For another one "
            f"({others}), set the option configuration"
        )
    return name, _list_stated(source, stated[name], suffixes, warn)


def _list_stated(
    source: SourceDirectory,
    stated: StatedConfiguration,
    suffixes: tuple[str, ...],
    warn: Callable[[str], None],
) -> list[tuple[str | None, str]]:
    card = source.path(CARD)
    if not stated.patterns:
        if not source.exists(stated.folder):
            raise UserError(
                f"{card}: the configuration {stated.name} is in the folder {stated.folder}, which "
                "is missing. Download it"
            )
        if named := _list_shards(source, stated.folder, suffixes):
            return [*_name_splits(named)]
        inside = (f"{stated.folder}/{e.name}" for e in source.entries(stated.folder))
        return [(None, file) for file in inside if _remove_suffix(file, suffixes)]
    found: dict[str, str] = {}
    files = [entry.name for entry in source.walk()]
    for split, pattern in stated.patterns:
        matched = [file for file in files if match_pattern(pattern, file)]
        if not matched:
            raise UserError(
                f"{card}: the configuration {stated.name} lists {pattern} for the split {split}, "
                "and no such file is there. Download it, or correct the header"
            )
        if media := next((f for f in matched if file_extension(f) in MODALITY_OF_EXTENSION), None):
            warn(
                f"{card}: lists media ({media}) by split; only lists of files of rows are read. "
                "Names of files and folders decide the splits instead"
            )
            return []
        for file in matched:
            if not _remove_suffix(file, suffixes):
                continue
            if found.setdefault(file, split) != split:
                raise UserError(
                    f"{card}: {file} belongs to the splits {found[file]} and {split}. Its rows "
                    "would be in both; correct the header"
                )
    return [*_name_splits([(split, file) for file, split in found.items()])]


def choose_classes(card: RepositoryCard, name: str) -> FileClasses:
    """Return the classes of a configuration; the only ones count for any configuration.

    Args:
        card: statements of the README.md.
        name: name of the configuration.
    """
    only = next(iter(card.classes.values())) if len(card.classes) == 1 else NO_CLASSES
    return card.classes.get(name, only)


def list_missing_splits(card: RepositoryCard, name: str, found: Iterable[str | None]) -> list[str]:
    """Return the splits that README.md names for a configuration, and that no file holds.

    Args:
        card: statements of the README.md.
        name: name of the configuration.
        found: splits of the files.
    """
    present = set(found)
    if present <= {None}:
        return []
    named = _name_splits([(split, "") for split in card.splits.get(name, ())])
    return [split for split, _ in named if split not in present]


def list_repository_files(
    source: SourceDirectory, suffixes: tuple[str, ...], wanted: str | None = None
) -> tuple[str, list[tuple[str, str]]]:
    """Return (name of the configuration, its (split, file)), going by the names of the files.

    A split of another name than train, validation or test keeps its name.

    Args:
        source: the directory of the repository, or of one of its configurations.
        suffixes: endings of files of rows.
        wanted: name of the configuration: a folder.

    Raises:
        SeveralConfigurationsError: the repository has several configurations.
        UserError: there is no such configuration.
    """
    if source.is_file:
        return DEFAULT, []
    is_repository = any(source.exists(name) for name in REPOSITORY_FILES)
    configurations: dict[str, list[tuple[str, str]]] = {}
    for folder in _iter_folders(source, "" if is_repository else DATA_FOLDER):
        if files := _list_shards(source, folder, suffixes):
            configurations[folder] = files
    if wanted is not None and wanted not in configurations:
        raise UserError(
            f"{source.uri}: no configuration {wanted!r}{suggest_name(wanted, configurations)}"
        )
    if len(configurations) > 1 and wanted is None:
        raise SeveralConfigurationsError(source.uri, list(configurations))
    name = wanted or next(iter(configurations), "")
    last = name.rpartition("/")[2]
    is_unnamed = last in ("", DATA_FOLDER)
    return DEFAULT if is_unnamed else last, _name_splits(configurations.get(name, []))


def require_all_shards(source: SourceDirectory, files: Iterable[str]) -> None:
    """Refuse an incomplete set of ``train-00000-of-00003.parquet``.

    Args:
        source: the directory of the files.
        files: paths of all files that are read.

    Raises:
        UserError: a shard is missing, or shards of two versions lie beside each other.
    """
    found = defaultdict[tuple[str, str], list[tuple[str, int]]](list)
    for file in files:
        folder, slash, name = file.rpartition("/")
        if part := _PART.fullmatch(name):
            found[f"{folder}{slash}{part[1]}", part[4] or ""].append((part[3], int(part[2])))
    for (prefix, ending), shards in found.items():
        totals, numbers = {total for total, _ in shards}, {number for _, number in shards}
        if len(totals) > 1 or len(numbers) < len(shards):
            raise UserError(
                f"{source.uri}: {prefix}…{ending}: {len(shards)} shards of several versions lie "
                "beside each other, so rows would occur twice. Remove those of the older version"
            )
        (total,) = totals
        # Some programs count from 1.
        start = 1 if int(total) in numbers and 0 not in numbers else 0
        if missing := sorted(set(range(start, start + int(total))) - numbers):
            width = len(total)
            named = [f"{prefix}{n:0{width}d}-of-{total}{ending}" for n in missing[:MAX_NAMED]]
            more = " …" if len(missing) > MAX_NAMED else ""
            raise UserError(
                f"{source.uri}: {len(missing):,} of {int(total):,} shards missing: "
                f"{', '.join(named)}{more}. Download them again. To use the others alone, rename "
                "them"
            )


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
