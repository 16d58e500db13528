"""Statements of ``README.md`` about the files and classes of a repository of the Hub.

The header of the file, between two lines ``---``, is YAML::

    configs:
    - config_name: zh
      data_files: [{split: train, path: "zh/train-*.parquet"}, {split: test, path: zh/test.parquet}]
    dataset_info:
      features: [{name: label, dtype: {class_label: {names: {"0": bad, "1": good}}}}]

:func:`read_card` reads it, and ``dataset_infos.json`` of older repositories. Both are not trusted:
only plain values are read, and patterns only select files of the directory. Scripts never run.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from pipelines.data.corpora.formats.class_names import FileClasses
from pipelines.data.corpora.formats.parquet_media import describe_features
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.config.safe_yaml import MAX_CHARACTERS, load_plain_yaml
from skillnet_platform.errors import UserError

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
