"""Fields of the first rows of a corpus, and the splits in which they hold values.

A single row does not decide, because it can lack fields that all other rows have. A public test
split often lacks the labels that it asks for.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from pipelines.data.io.field_names import fold_name

#: Rows of a file, or members of a tar, that are sampled.
SAMPLE_ROWS = 1000
#: Words of a sentence, and characters in which they are counted.
MIN_WORDS, _SENTENCE_CHARACTERS = 3, 200


class SchemaSample:
    """Field names of sampled rows, with the splits in which each field holds a value."""

    def __init__(self) -> None:
        #: Field names in the order in which they occur.
        self.names: list[str] = []
        self._filled: defaultdict[str | None, set[str]] = defaultdict(set)
        # Fields with a value of -1 in a split, and fields with any other value.
        self._minus_one: defaultdict[str | None, set[str]] = defaultdict(set)
        self._other: defaultdict[str | None, set[str]] = defaultdict(set)
        # Name in small letters -> the first form of it.
        self._known: dict[str, str] = {}
        # By field: values, texts, sentences, and hashes of the different texts.
        self._values, self._texts, self._sentences = Counter[str](), Counter[str](), Counter[str]()
        self._different = defaultdict[str, set[int]](set)

    def add(self, split: str | None, fields: Mapping[str, Any]) -> None:
        """Add a row of a split; None is an unknown split."""
        named = {self._find_known(name, fields): value for name, value in fields.items()}
        self.names += [name for name in named if name not in self.names]
        for name, value in named.items():
            if not is_empty_value(value):
                self._filled[split].add(name)
                (self._minus_one if is_minus_one(value) else self._other)[split].add(name)
                self._values[name] += 1
                if isinstance(value, str):
                    self._texts[name] += 1
                    self._sentences[name] += is_sentence(value)
                    self._different[name].add(hash(value))

    def _find_known(self, name: str, fields: Mapping[str, Any]) -> str:
        """Return the name by which another file writes a field with other capitals or blanks."""
        known = self._known.setdefault(fold_name(name), name)
        return name if known in fields else known

    @property
    def filled_fields(self) -> list[str]:
        """Names of the fields that hold a value in at least one row."""
        filled = {name for names in self._filled.values() for name in names}
        return [name for name in self.names if name in filled]

    @property
    def text_fields(self) -> list[str]:
        """Names of the fields whose values are texts."""
        return [name for name in self.names if 2 * self._texts[name] > self._values[name]]

    @property
    def sentence_fields(self) -> list[str]:
        """Names of the fields that mostly hold sentences, and not a few ones again and again."""
        return [
            name
            for name in self.text_fields
            if 2 * self._sentences[name] > self._values[name]
            and 3 * len(self._different[name]) >= self._values[name]
        ]

    def has_value(self, split: str | None, field: str) -> bool:
        """Return whether a row of the split has a value in the field.

        A label of -1 means "no label", as in the tests of GLUE, unless training rows have it too.
        """
        if field in self._other[split]:
            return True
        return field in self._minus_one[split] and field in self._minus_one["train"]


def is_sentence(text: str) -> bool:
    """Return whether a text has at least three words, or six characters of a script without blanks.

    Names of people, places and classes are shorter.
    """
    start = text[:_SENTENCE_CHARACTERS]
    words = [word for word in start.split() if any(map(str.isalpha, word))]
    return len(words) >= MIN_WORDS or sum(c > "\u2e80" for c in start) >= 2 * MIN_WORDS


def is_empty_value(value: Any) -> bool:
    """Return whether a value is None, NaN, an empty or blank text, or an empty collection."""
    if isinstance(value, str):
        return not value.strip()
    empty = isinstance(value, bytes | list | tuple | dict) and not value
    return value is None or empty or (isinstance(value, float) and value != value)


def is_minus_one(value: Any) -> bool:
    """Return whether a value is -1, as a number or as a text."""
    return isinstance(value, int | float | str) and str(value).strip() in ("-1", "-1.0")
