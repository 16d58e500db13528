"""Names of the classes that the files of a corpus bring, and their numbers.

A file can number its classes in an order of its own. Its numbers mean its own names, so
:func:`name_class` replaces them file by file. :func:`unify_class_names` compares the names of all
files and decides the order of the class ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from skillnet_platform import console
from skillnet_platform.errors import UserError

#: Names that a message shows.
MAX_NAMED = 8
#: Characters of the number of a class in a text.
_MAX_DIGITS = 9


@dataclass(frozen=True)
class FileClasses:
    """Columns of classes in one file.

    Attributes:
        file: path or URI of the file, for messages.
        names: column of class numbers -> names of the classes.
        unnamed: columns of whole numbers, or of lists of them, without names.
    """

    file: str
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unnamed: frozenset[str] = frozenset()


#: A file that describes no column.
NO_CLASSES = FileClasses("")


def unify_class_names(files: Iterable[FileClasses]) -> dict[str, tuple[str, ...]]:
    """Return column -> names of its classes in the order of their ids: that of the first file.

    A file without names takes those of the others, with a warning, because this is a guess.

    Args:
        files: classes of all files of a corpus, training first.

    Raises:
        UserError: two files name different classes, or a name occurs twice in a file.
    """
    known = list(files)
    first: dict[str, FileClasses] = {}
    for described in known:
        for column, names in described.names.items():
            if repeated := next((name for name in names if names.count(name) > 1), None):
                raise UserError(
                    f"{described.file}: the class {repeated!r} occurs twice among the names of the "
                    f"column {column}. Give each class one name"
                )
            reference = first.setdefault(column, described)
            if set(names) != set(reference.names[column]):
                difference = _compare_names(names, reference.names[column])
                raise UserError(
                    f"{described.file}: the classes of the column {column} are not those of "
                    f"{reference.file}: {difference}. Give both files the same classes, or prepare "
                    "them as two corpora"
                )
    for column, reference in first.items():
        unnamed = [each.file for each in known if column in each.unnamed]
        if unnamed:
            more = f" and {len(unnamed) - 1:,} further files" if len(unnamed) > 1 else ""
            console.print_warning(
                f"{unnamed[0]}{more}: names no classes in the column {column}; its numbers are "
                f"read by the names in {reference.file}. If they mean other classes, write the "
                "names instead of the numbers"
            )
    return {column: described.names[column] for column, described in first.items()}


def _compare_names(here: Sequence[str], there: Sequence[str]) -> str:
    added = [name for name in here if name not in set(there)]
    missing = [name for name in there if name not in set(here)]
    parts = [("only the first file has", added), ("only the second file has", missing)]
    return "; ".join(
        f"{words} {', '.join(names[:MAX_NAMED])}{' …' if len(names) > MAX_NAMED else ''}"
        for words, names in parts
        if names
    )


def find_class_names(feature: Any) -> tuple[str, ...]:
    """Return the names of a class, or of a list of classes, () for another feature.

    Args:
        feature: description of a column by the library ``datasets``.
    """
    while isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        feature = feature.get("feature")
    if isinstance(feature, list) and len(feature) == 1:
        return find_class_names(feature[0])
    if not isinstance(feature, dict) or feature.get("_type") != "ClassLabel":
        return ()
    names = feature.get("names")
    are_texts = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return tuple(names) if names and are_texts else ()


def name_classes(class_names: Mapping[str, Sequence[str]], record: dict[str, Any]) -> None:
    """Replace the numbers of classes in a record by their names.

    Args:
        class_names: column -> names of its classes in the order of their numbers.
        record: the record of a file.
    """
    for column, names in class_names.items():
        if column in record:
            record[column] = name_class(names, record[column])


def name_class(class_names: Sequence[str], value: Any) -> Any:
    """Return the name of a class number, or the names of a list; another value as it is.

    Args:
        class_names: names of the classes in the order of their numbers.
        value: value of a column of classes. A text is a name, or a number if no class has the name.
    """
    if isinstance(value, list):
        return [name_class(class_names, each) for each in value]
    number = value
    if isinstance(value, str) and value.strip() not in class_names:
        digits = value.strip()
        number = int(digits) if digits.isdecimal() and len(digits) <= _MAX_DIGITS else value
    elif isinstance(value, float) and value.is_integer():
        number = int(value)
    is_number = isinstance(number, int) and 0 <= number < len(class_names)
    return class_names[number] if is_number else value
