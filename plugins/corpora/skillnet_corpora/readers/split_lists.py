"""Media in folders that name splits and classes, and the files beside them.

    testing_list.txt                    "right/a69b9b3e_nohash_0.wav" (Speech Commands)
    meta/train.txt                      "apple_pie/1005649" (Food-101)
    ucfTrainTestlist/trainlist01.txt    "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1" (UCF-101)
    brush_hair_test_split1.txt          "clip.avi 1": 1 is training, 2 is test (HMDB51)
    images.txt, train_test_split.txt    "1 001.Auk/1.jpg" and "1 0" (CUB-200)

:func:`find_split_lists` reads the lists, and :func:`find_other_annotations` finds files that
describe the media one by one: transcripts, boxes, tables of labels. :func:`find_split_root` finds
folders that name the splits.
"""

import contextlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from pipelines.data.io.directory import DAMAGE_ERRORS, SourceDirectory
from skillnet_corpora.readers.fields import (
    MODALITY_OF_EXTENSION,
    file_extension,
    parse_split_name,
)
from skillnet_corpora.readers.unread_files import is_annotation_name
from skillnet_platform.errors import UserError

#: Endings of lists that are read, and of those that are not.
_LIST_SUFFIXES = (".txt", ".lst", ".csv", ".tsv", ".list")
_CLOSED_SUFFIXES = (".mat", ".pkl", ".npy", ".xls", ".xlsx")
#: HMDB51: a list per class and division.
_FLAGGED_NAME = re.compile(r".+_split(\d)\.txt")
_FLAGS = {"1": "train", "2": "test"}
#: CUB-200: image numbers with names, and with 1 for training.
_NUMBERED = ("images.txt", "train_test_split.txt")
#: Levels of folders below the directory in which lists are searched.
_DEPTH = 3
#: Annotation files whose names are compared with those of media.
_COMPARED_FILES = 10_000
#: Files, lines of each and bytes of a line that are searched for names of media.
_SEARCHED_FILES, _SEARCHED_LINES, _SEARCHED_BYTES = 64, 50, 2**16
#: Digits of the shortest number that can name a file.
_NUMBER_DIGITS = 5
#: Folders whose names say how files are stored, not what they show.
_STORAGE_FOLDER = re.compile(
    r"(jpeg|png)?(images?|imgs?)|masks?|labels?|annotations?|trimaps|segmentation\w*|gt"
    r"|ground_?truth|audios?|wavs?\d*|flac|clips|videos?|frames|media|data|raw"
    r"|(fold|part|batch|shard|chunk|disc|split)[-_ ]?\d+",
    re.IGNORECASE,
)


@dataclass
class SplitLists:
    """Splits of media by their names.

    Args:
        splits: name of a media file, with or without its folders and ending -> split.
        files: lists that were read.
        unused: lists of further divisions, which are not read.
        closed: lists in a format that is not read.
    """

    splits: dict[str, str] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    @property
    def named(self) -> frozenset[str]:
        """The splits that the lists define; files in none of them are training files."""
        found = frozenset(self.splits.values())
        return found | {"train"} if found else found

    def find(self, path: str) -> str | None:
        """Return the split of a media file, None if no list names it.

        Args:
            path: location of the file, from the directory of the corpus.
        """
        for name in _iter_names(path):
            if (split := self.splits.get(name)) is not None:
                return split
        return None if "train" in self.splits.values() else "train"


def find_split_lists(source: SourceDirectory) -> SplitLists:
    """Return the lists of splits of a directory with media; empty if it has none.

    A file is a list if it has the name of a split and half of its lines name media.

    Args:
        source: the directory of the corpus.

    Raises:
        UserError: two lists of different splits name one file.
    """
    found = SplitLists()
    candidates = dict[str, tuple[str, int]]()
    flagged: list[str] = []
    # A directory can hold a text file per medium, so other names are not kept.
    names = [entry.name for entry in source.walk(depth=_DEPTH) if _has_list_name(entry.name)]
    for file in names:
        base = file.rpartition("/")[2].lower()
        if _FLAGGED_NAME.fullmatch(base):
            flagged.append(file)
        elif (parsed := _parse_list_name(base)) is not None:
            if base.endswith(_CLOSED_SUFFIXES):
                found.closed.append(file)
            elif base.endswith(_LIST_SUFFIXES):
                candidates[file] = parsed
    listed: dict[str, list[tuple[str, str]]] = {}
    for file, (split, division) in sorted(candidates.items(), key=lambda each: each[1][1]):
        if division > 1:
            found.unused.append(file)
            continue
        listed[file] = [(name, split) for name in _read_names(source, file)]
    for file in flagged:
        if file.lower().endswith("_split1.txt"):
            listed[file] = list(_read_flagged(source, file))
        else:
            found.unused.append(file)
    for file in names:
        if file.rpartition("/")[2].lower() == _NUMBERED[1]:
            folder = file.rpartition("/")[0]
            images = join_path(folder, _NUMBERED[0])
            if images in names:
                listed[file] = list(_read_numbered(source, images, file))
                found.files.append(images)
    if not any(listed.values()):
        return SplitLists(closed=found.closed)
    _keep_lists_of_media(source, listed, found)
    return found


def _keep_lists_of_media(
    source: SourceDirectory, listed: dict[str, list[tuple[str, str]]], found: SplitLists
) -> None:
    """Keep the lists half of whose names are those of media."""
    owners: dict[str, list[str]] = {}
    for file, pairs in listed.items():
        for name, _ in pairs:
            owners.setdefault(name, []).append(file)
    hits = Counter[str]()
    for entry in source.walk():
        if _is_media(entry.name):
            known = next((name for name in _iter_names(entry.name) if name in owners), None)
            hits.update(owners[known] if known is not None else ())
    origin: dict[str, str] = {}
    for file, pairs in listed.items():
        if not pairs or hits[file] < len(pairs) / 2:
            continue
        found.files.append(file)
        for name, split in pairs:
            other = found.splits.get(name, split)
            # ``trainval`` repeats the files of ``val``.
            if {split, other} == {"train", "validation"}:
                split = "validation"
            elif split != other:
                raise UserError(
                    f"{source.path(file)}: names {name} for {split}, and {origin[name]} names it "
                    f"for {other}. Remove it from one of the lists"
                )
            found.splits[name] = split
            origin[name] = file
    if not found.splits:
        found.files.clear()


def find_other_annotations(
    source: SourceDirectory, known: Iterable[str], find_class: Callable[[str], str | None]
) -> tuple[str, str] | None:
    """Return (annotation file, media file that it describes), None if there are none.

    A file describes media if it has the name of a media file but for the ending, or if half of its
    lines name media without naming their folders as classes.

    Args:
        source: the directory of the corpus.
        known: files that are read.
        find_class: returns the class of a media file by its folder.
    """
    skipped = set(known)
    files = (entry.name for entry in source.walk())
    described = (name for name in files if name not in skipped and is_annotation_name(name))
    annotations = list(islice(described, _COMPARED_FILES))
    if not annotations:
        return None
    stems = {_remove_ending(file.rpartition("/")[2]): file for file in reversed(annotations)}
    lines: dict[str, list[set[str]]] = {
        file: list(_read_tokens(source, file)) for file in annotations[:_SEARCHED_FILES]
    }
    owners: dict[str, list[tuple[str, int]]] = {}
    for file, each in lines.items():
        for number, tokens in enumerate(each):
            for token in tokens:
                # A short number names no file, but it can name a class.
                if token.isdecimal() and len(token) < _NUMBER_DIGITS:
                    continue
                owners.setdefault(token, []).append((file, number))
    matched: dict[str, dict[int, str]] = {}
    for entry in source.walk():
        if not _is_media(entry.name):
            continue
        stem = _remove_ending(entry.name.rpartition("/")[2])
        if stem in stems:
            return stems[stem], entry.name
        label = find_class(entry.name)
        for name in _iter_names(entry.name):
            for file, number in owners.get(name, ()):
                # A line that names the class confirms that the folders are classes.
                if label is None or label not in lines[file][number]:
                    matched.setdefault(file, {})[number] = entry.name
    for file, found in matched.items():
        if len(found) >= max(len(lines[file]) / 2, 1):
            return file, next(iter(found.values()))
    return None


def are_storage_folders(classes: Iterable[str]) -> bool:
    """Return whether all folders have names such as ``images`` and ``masks``, or ``fold1``."""
    return all(_STORAGE_FOLDER.fullmatch(name) for name in classes)


def _is_media(file: str) -> bool:
    return file_extension(file) in MODALITY_OF_EXTENSION


def _has_list_name(file: str) -> bool:
    base = file.rpartition("/")[2].lower()
    if _is_media(base):
        return False
    is_known = base in _NUMBERED or _FLAGGED_NAME.fullmatch(base) is not None
    return is_known or _parse_list_name(base) is not None


def _parse_list_name(name: str) -> tuple[str, int] | None:
    """Return (split, number of the division) of a list: ``trainlist01.txt -> ("train", 1)``."""
    stem = name.partition(".")[0]
    digits = re.search(r"(?<!\d)0?(\d)$", stem)
    words = re.split(r"[^a-z]+", stem)
    words = [re.sub(r"(list|files|images|split|set|s)$", "", word) or word for word in words]
    words = ["train" if word == "trainval" else word for word in words]
    splits = {parse_split_name(word) for word in words} - {None}
    if len(splits) != 1:
        return None
    return str(splits.pop()), int(digits[1]) if digits else 0


def _iter_names(path: str) -> Iterator[str]:
    """Yield the names of a media file in lists: with fewer and fewer folders, and no ending."""
    parts = unicodedata.normalize("NFC", path).split("/")
    for start in range(len(parts)):
        name = "/".join(parts[start:])
        yield name
        yield _remove_ending(name)


def _remove_ending(name: str) -> str:
    stem, dot, ending = name.rpartition(".")
    return stem if dot and "/" not in ending else name


def _read_lines(source: SourceDirectory, file: str) -> Iterator[str]:
    with contextlib.suppress(*DAMAGE_ERRORS, UserError):
        for _, line in source.lines(file):
            text = unicodedata.normalize("NFC", line.decode("utf-8", "replace"))
            yield text.strip().replace("\\", "/")


def _read_names(source: SourceDirectory, file: str) -> Iterator[str]:
    """Yield the first field of each line, which can have a label behind it."""
    for line in _read_lines(source, file):
        name = re.split(r"[\s,;]+", line)[0].strip("\"'")
        # A name can have blanks; then its ending shows where it ends.
        if _is_media(line) and not _is_media(name):
            name = line.strip("\"'")
        if name:
            yield name.removeprefix("./").lstrip("/")


def _read_flagged(source: SourceDirectory, file: str) -> Iterator[tuple[str, str]]:
    for line in _read_lines(source, file):
        name, _, flag = line.rpartition(" ")
        if flag in _FLAGS:
            yield name.strip(), _FLAGS[flag]


def _read_numbered(source: SourceDirectory, images: str, file: str) -> Iterator[tuple[str, str]]:
    names = dict(line.partition(" ")[::2] for line in _read_lines(source, images))
    for line in _read_lines(source, file):
        number, _, flag = line.partition(" ")
        if number in names and flag in ("0", "1"):
            yield names[number], "train" if flag == "1" else "test"


def _read_tokens(source: SourceDirectory, file: str) -> Iterator[set[str]]:
    """Yield the words of each line at the start of a text file."""
    if file.lower().endswith(_CLOSED_SUFFIXES) or file.lower().endswith((".parquet", ".gz")):
        return
    with contextlib.suppress(*DAMAGE_ERRORS, UserError), source.open(file) as stream:
        text = stream.read(_SEARCHED_BYTES).decode("utf-8", "replace")
        for line in text.splitlines()[:_SEARCHED_LINES]:
            line = line.replace("\\", "/")
            # Names of files can have blanks.
            words = re.split(r"[\s,;|\"'<>\[\]{}]+|:\s", line)
            words += [word.strip(" \"'") for word in re.split(r"[,;|\t]", line)]
            yield {*words} - {""}


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
