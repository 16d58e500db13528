"""Rule that labels the rows of a prepared corpus: options of ``--corpus NAME=labels:CORPUS``.

:mod:`pipelines.data.preprocessing.labelled_corpus` applies it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from skillnet_platform import config
from skillnet_platform.config.schema import check_keys
from skillnet_platform.errors import UserError

#: Format of a corpus that is labelled by a rule: ``labels:CORPUS``.
LABELS_FORMAT = "labels"
#: Characters of a pattern.
MAX_PATTERN = 4096


@dataclass
class LabelRule:
    """How the rows of a prepared corpus get their labels.

    Args:
        column: column of the prepared rows: texts, whole numbers, or lists of texts, which are
            read as one text with a line for each.
        pattern: regular expression of Python, searched in the text. The label is the name of the
            group that matches, else the first group, else the match. By default it is the text.
        count: [least, most]; the label is the number of matches, at least and at most these.
        classes: number of classes, the most frequent labels of ``train``; or their names in the
            order of their ids. By default all labels of ``train``.
        other: name of one further class for all other rows, which are rejected otherwise.
    """

    column: str = ""
    pattern: str | None = None
    count: list[int] | None = None
    classes: int | list[str] | None = None
    other: str | None = None

    def __post_init__(self) -> None:
        if not self.column:
            raise ValueError("column is missing. Name the column that the labels come from")
        if len(self.pattern or "") > MAX_PATTERN:
            raise ValueError(f"pattern has more than {MAX_PATTERN} characters. Give a shorter one")
        if isinstance(self.classes, int) and self.classes < 1:
            raise ValueError(f"classes is {self.classes}. Give a number from 1, or names")
        if self.count is None:
            return
        if self.pattern is None:
            raise ValueError("count needs a pattern. Give the pattern whose matches are counted")
        if len(self.count) != 2 or not 0 <= self.count[0] < self.count[1]:
            raise ValueError(
                f"count is {self.count}. Give the least and the most number of matches, "
                "such as [1, 6]"
            )


def read_label_rule(name: str, options: Mapping[str, Any]) -> LabelRule:
    """Return the rule of a corpus.

    Args:
        name: name of the corpus, for messages.
        options: its options in the configuration.

    Raises:
        UserError: an option is unknown or has a wrong value.
    """
    prefix = f"options.{name}"
    try:
        tree = check_keys(LabelRule, dict(options), prefix)
        values = config.merge_trees(config.default_values(LabelRule), tree)
        return config.build_config(LabelRule, values, dict.fromkeys(values, prefix))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{prefix}: {error}") from None
