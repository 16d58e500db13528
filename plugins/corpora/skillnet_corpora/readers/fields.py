"""Base class of ``folder``, ``webdataset`` and ``hf_dataset``: modality and fields by name.

:func:`find_field` and :func:`choose_fields` find the fields of a corpus among the names of sampled
rows. :func:`read_field` reads a field of a row. Capitals and surrounding blanks of names do not
matter, because files can write a name differently.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal

from pipelines.data.corpora.base import RejectedRow, Row, SourceArchives, stable_hash
from pipelines.data.corpora.readers.base import (
    CaptionOptions,
    ExternalCorpus,
    MediaOptions,
    SplitOptions,
    read_label_set,
    read_number,
)
from pipelines.data.corpora.readers.row_builders import (
    UnwantedRowError,
    clean_captions,
    clean_text,
    hash_caption_group,
    hash_split,
    make_key,
    media_row,
    normalize_transcript,
    val_or_test,
)
from pipelines.data.io.field_names import fold_name
from pipelines.data.io.media import MediaRef
from pipelines.data.transforms.code import first_paragraph
from skillnet.modality import BUILT_IN_MODALITIES, CAPTION_MODALITY, find_modality, list_modalities
from skillnet_corpora.readers.joined_captions import ITEM_FIELD, join_captions
from skillnet_corpora.readers.schema_sample import SchemaSample, is_empty_value, is_minus_one
from skillnet_platform import console
from skillnet_platform.errors import UserError, suggest_name

#: Names of a text beside the usual one. A field of another name counts if it holds sentences.
SECOND_TEXT_FIELDS = frozenset(
    (
        "text_pair", "text1", "text2", "text_a", "text_b", "title", "headline", "body", "premise",
        "hypothesis", "question", "question1", "question2", "context", "sentence1", "sentence2",
        "sentence_a", "sentence_b", "query", "passage", "answer", "summary", "document", "abstract",
        "reply", "response", "prompt",
    )
)  # fmt: skip
#: The same words before numbers and marks were normalized, as in LJSpeech and FLEURS.
RAW_TEXT_FIELDS = frozenset(("raw_text", "raw_transcription"))


def find_field(names: Collection[str], common: Iterable[str], option: str = "") -> str | None:
    """Return the first field that has one of some common names, None without any.

    Args:
        names: names of fields.
        common: common names in small letters, the most likely one first.
        option: option that names the field, for the message; "" to take the first of equal names.

    Raises:
        UserError: names of two fields differ only in capitals and blanks.
    """
    folded: dict[str, list[str]] = {}
    for name in names:
        folded.setdefault(fold_name(name), []).append(name)
    found = next((folded[name] for name in common if name in folded), [])
    if len(found) > 1 and option:
        raise _ambiguous_error(found, option)
    return found[0] if found else None


def match_field(names: Collection[str], wanted: str, option: str) -> str:
    """Return the field that a user names; its exact name wins.

    Args:
        names: names of fields.
        wanted: name in the option.
        option: the option, for the message.

    Raises:
        UserError: no field has the name, or several do except for capitals and blanks.
    """
    if wanted in names:
        return wanted
    found = [name for name in names if fold_name(name) == fold_name(wanted)]
    if len(found) > 1:
        raise _ambiguous_error(found, option)
    if not found:
        hint = suggest_name(wanted, names)
        more = hint if "did you mean" in hint else f"; rows have {', '.join(names) or 'none'}"
        raise UserError(f"{option}: no field {wanted!r}{more}")
    return found[0]


def choose_fields(names: Collection[str], wanted: str, option: str) -> tuple[str, ...]:
    """Return the fields that a user names, with commas between several.

    Args:
        names: names of fields.
        wanted: value of the option.
        option: the option, for the message.

    Raises:
        UserError: see :func:`match_field`.
    """
    is_single = "," not in wanted or wanted in names
    parts = [wanted] if is_single else [part.strip() for part in wanted.split(",") if part.strip()]
    return tuple(match_field(names, part, option) for part in parts or [wanted])


def read_field(fields: Mapping[str, Any], name: str | None) -> Any:
    """Return the value of a field, None if there is no such field.

    Args:
        fields: fields of a row.
        name: name of the field; another row can write it with other capitals or blanks.
    """
    if name is None or name in fields:
        return fields.get(name or "")
    wanted = fold_name(name)
    return next((value for each, value in fields.items() if fold_name(each) == wanted), None)


def list_further_texts(
    names: Iterable[str], sentences: Collection[str], used: Collection[str]
) -> list[str]:
    """Return the fields of texts that are not read.

    Args:
        names: fields that hold a text in the sampled rows.
        sentences: those whose texts are sentences, different ones in most rows.
        used: fields that are read.
    """
    known = {fold_name(name) for name in used} | RAW_TEXT_FIELDS
    texts = (name for name in names if name in sentences or fold_name(name) in SECOND_TEXT_FIELDS)
    return [name for name in texts if fold_name(name) not in known]


def _ambiguous_error(found: list[str], option: str) -> UserError:
    return UserError(
        f"{option}: the fields {', '.join(found)} differ only in capitals or blanks. Name one of "
        f"them: --{option} {found[0]!r}"
    )


#: Ending of a media file -> modality.
MODALITY_OF_EXTENSION = {
    extension: modality.name
    for modality in reversed(list_modalities())
    if not modality.reads_tokens
    for extension in modality.extensions
}
SPEAKER_FIELDS = ("speaker_id", "speaker", "spk_id", "client_id")
LABEL_FIELDS = ("label", "labels", "cls", "class", "category", "intent")
LABEL_SET_FIELDS = ("labels", "tags", "categories", "classes")
VALUE_FIELDS = ("value", "score", "rating", "target")
#: Annotations that come from the field of the label.
LABELLED = ("labels", "label_sets", "values", "pairs")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "development"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
ALL_SPLITS = frozenset(SPLIT_NAMES.values())
#: Some corpora append a year or number to the name of a split: ``train2017``, ``val_2``.
_SPLIT_NAME = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?:[-_ ]?[0-9]+)?")
_SPLIT_PREFIX = re.compile(rf"({'|'.join(SPLIT_NAMES)})[0-9]*(?=[-_.]|$)")
#: End of a message that names several fields of texts.
JOINED_TEXTS = " to join them, or one of them"
#: Split of test rows without labels, for prediction.
UNLABELLED = "unlabelled"


def _list_options() -> Any:
    """Return the options of all installed modalities.

    Raises:
        UserError: an option of another package's modality has the name of another option.
    """
    known: set[str] = set()
    for modality in list_modalities():
        names = {each.name for each in fields(modality.file_half.Options)}
        if modality.name not in BUILT_IN_MODALITIES and (taken := sorted(names & known)):
            raise UserError(
                f"modality {modality.name}: its option {taken[0]} has the name of another option. "
                "Rename it in the package"
            )
        known |= names
    return [each.file_half.Options for each in list_modalities()]


_MODALITY_OPTIONS = _list_options()


@dataclass
class RecordOptions(SplitOptions, CaptionOptions, *_MODALITY_OPTIONS, MediaOptions):  # type: ignore[misc]
    """A corpus of any modality.

    Args:
        modality: name of the modality of the rows, such as text or image; detected from the first
            rows by default.
        text: field of the text, the transcript or the captions; a common name by default. Several
            fields of texts with commas between them are joined in this order.
        label: field of the class, the classes or the number; a common name by default.
        split: field with the split of each row; by default ``split``, if one metadata file holds
            all rows.
        split_by: field whose values stay in one split if splits are made, for example the speaker
            or the film. Intervals and tests count its values, not rows. By default a common name
            of the speaker's field counts.
        task: "labels" to classify, "captions" or "transcripts" to pair with texts, for rows that
            have both. "label_sets" to give a row any number of classes, "values" to predict a
            number, "pairs" to find other rows of the same item: they read the field of the label.
        separator: between the classes of a row in a text, for "label_sets". A list needs none.
    """

    modality: str | None = None
    text: str | None = None
    label: str | None = None
    split: str | None = None
    split_by: str | None = None
    task: Literal["labels", "label_sets", "values", "pairs", "captions", "transcripts"] | None = (
        None
    )
    separator: str = "|"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality is not None:
            try:
                find_modality(self.modality)
            except ValueError as error:
                raise ValueError(f"modality: {error}") from None
        if not self.separator.strip():
            raise ValueError("separator is blank; give the text between two labels, such as ;")


class RecordCorpus(ExternalCorpus):
    """A corpus whose rows are mappings of fields, with or without a media file.

    Attributes:
        named_splits: splits that the corpus itself defines.
        text_field: field of the text, transcript or captions, if there is one.
        text_fields: fields of the text, more than one if they are joined.
        label_field: field of the class, if there is one.
        split_field: field with the split of each row, if there is one.
        class_names: field of class numbers -> names of the classes, as the corpus itself defines.
        test_unlabelled: whether the test rows have no annotations, so that they cannot be used for
            an evaluation.
    """

    Options = RecordOptions
    captions_equivalent = True
    named_splits: frozenset[str] = frozenset()
    text_field: str | None = None
    text_fields: tuple[str, ...] = ()
    label_field: str | None = None
    split_field: str | None = None
    class_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    test_unlabelled: bool = False
    is_general = True

    @property
    def _reads_texts(self) -> bool:
        return self.modality == CAPTION_MODALITY

    @property
    def _reads_strings(self) -> bool:
        """Whether the rows are texts or code, without media."""
        return find_modality(self.modality).reads_tokens

    def infer_schema(
        self,
        fields: Iterable[str],
        extension: str | None,
        filled: Collection[str] | None = None,
        sample: SchemaSample | None = None,
    ) -> None:
        """Choose modality and fields by the names of the fields and the ending of media files.

        Args:
            fields: names of all fields.
            extension: ending of the media files, None without media.
            filled: fields that hold a value in a sampled row. Common names are only looked up
                among them. By default all fields.
            sample: sampled rows, to find texts that stay unread.

        Raises:
            UserError: the modality cannot be detected, or no field can be learned from.
        """
        names, options = list(fields), self.options
        filled = names if filled is None else filled
        without_media = detect_strings(filled) if extension is None else CAPTION_MODALITY
        by_extension = MODALITY_OF_EXTENSION.get(extension, "") if extension else without_media
        self.modality = options.modality or by_extension
        if not self.modality:
            raise UserError(
                f"{self.source.uri}: cannot detect the modality of .{extension} files; give "
                f"--options.{self.name}.modality"
            )
        prefix = f"options.{self.name}"
        common = self.modality_files.text_fields
        self._choose_texts(names, filled, common, sample)
        has_text = self._reads_texts or self.text_field is None
        kind = options.task if options.task in LABELLED else "labels"
        usual = {"label_sets": LABEL_SET_FIELDS, "values": VALUE_FIELDS}.get(kind, ())
        classes = (*usual, *LABEL_FIELDS, *(map(fold_name, self.class_names) if has_text else ()))
        self.label_field = _choose_field(names, options.label, filled, classes, f"{prefix}.label")
        self.split_field, _ = (
            _choose_field(names, getattr(options, key), (), (), f"{prefix}.{key}")
            for key in ("split", "split_by")
        )
        paired = find_modality(self.modality).paired_annotation
        annotations = [paired] * (not self._reads_texts and self.text_field is not None)
        annotations += [kind] * (self.label_field is not None)
        if options.task is not None:
            # An explicit task selects one of several annotations.
            if options.task not in annotations:
                raise UserError(
                    f"{prefix}.task: rows have no {options.task}; they have "
                    f"{', '.join(names) or 'no fields'}"
                )
            annotations = [options.task]
        if "pairs" in annotations and self._reads_texts:
            raise UserError(f"{prefix}.task: texts pair with captions; name their field as text")
        if self._reads_texts and self.text_field is None:
            further = self._list_further_texts(sample)
            if blank := find_field(names, common):
                raise UserError(
                    f"{self.source.uri}: the field {blank} is blank in the first rows. Fill it, or "
                    f"name the field of the text: --{prefix}.text"
                )
            raise UserError(
                f"{self.source.uri}: no text field among {', '.join(names) or 'none'}; give "
                f"--{prefix}.text{' ' if further else ''}{','.join(further)}"
                f"{JOINED_TEXTS if len(further) > 1 else ''}"
            )
        if not annotations and filled:
            console.print_warning(
                f"{self.source.uri}: neither captions nor labels among the fields "
                f"{', '.join(filled)}. The rows are prepared without them, for pretraining. If a "
                f"field holds them, name it: --{prefix}.text FIELD, or --{prefix}.label FIELD"
            )
        self.annotations_present = tuple(annotations)
        if {"labels", "label_sets"} & set(annotations):
            self.labels = self.class_names.get(self.label_field or "", ())
        self._report_further_texts(sample)

    def _choose_texts(
        self,
        names: list[str],
        filled: Collection[str],
        common: Iterable[str],
        sample: SchemaSample | None,
    ) -> None:
        """Choose the fields of the text, the transcript or the captions."""
        option, wanted = f"options.{self.name}.text", self.options.text
        if wanted is not None:
            self.text_fields = choose_fields(names, wanted, option)
            if len(self.text_fields) > 1 and not self._reads_texts:
                raise UserError(
                    f"{option}: several fields are joined for texts only; give one of "
                    f"{', '.join(self.text_fields)}"
                )
        else:
            found = find_field(filled, common, option)
            self.text_fields = (found,) if found else ()
        self.text_field = next(iter(self.text_fields), None)

    def _list_further_texts(self, sample: SchemaSample | None) -> list[str]:
        """Return the fields of texts that are not read, in the order of the fields."""
        if sample is None:
            return []
        options = self.options
        used = [*self.text_fields, self.label_field, self.split_field, options.split_by]
        used += [*SPEAKER_FIELDS, "split"]
        known = [name for name in used if name]
        return list_further_texts(sample.text_fields, sample.sentence_fields, known)

    def _report_further_texts(self, sample: SchemaSample | None) -> None:
        """Say which texts of the rows are not read, unless the user chose the field."""
        further = self._list_further_texts(sample)
        is_read = self._reads_texts or {"captions", "transcripts"} & set(self.annotations_present)
        is_chosen = self.options.text is not None or self.modality_files.row_fields
        if is_chosen or not further or not is_read:
            return
        option = f"--options.{self.name}.text"
        joined = [n for n in sample.names if n in {*further, *self.text_fields}] if sample else []
        remedy = f"To join them: {option} {','.join(joined)}"
        if not self._reads_texts:
            remedy = f"To read another field: {option} FIELD"
        console.print_warning(
            f"{self.source.uri}: reads the field {self.text_field}, and not the texts of "
            f"{', '.join(further)}. {remedy}. To keep it so: {option} {self.text_field}"
        )

    def resolve_test_split(self, sample: SchemaSample) -> None:
        """Mark the test split as unlabelled if the sample has no annotations in it.

        A public test often omits the labels that a competition asks for.

        Args:
            sample: rows of the test, and of the training split.
        """
        annotated = [
            self.label_field if annotation in LABELLED else self.text_field
            for annotation in self.annotations_present
        ]
        if "test" not in self.named_splits or not annotated:
            return
        if not any(sample.has_value("test", field) for field in annotated if field is not None):
            self.mark_test_unlabelled()

    def mark_test_unlabelled(self) -> None:
        """Treat the test rows as unlabelled, and make a new test as if none were given.

        Rows to classify become the split ``unlabelled``. Media without captions or transcripts are
        rejected.
        """
        self.test_unlabelled, self.named_splits = True, self.named_splits - {"test"}
        self.allow_unlabelled_rows()

    def allow_unlabelled_rows(self) -> None:
        """Make the split ``unlabelled`` of rows to classify that have no label."""
        self.unlabelled_splits = (UNLABELLED,) if self._has_labels_only() else ()

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the rows of all records, the captions of one media file in one row.

        The rows of :meth:`build_rows` have ``ITEM_FIELD`` where several can be of one media file.
        """
        if "captions" in self.annotations_present and not self._reads_strings:
            yield from join_captions(self.build_rows, self.is_preview)
            return
        for row in self.build_rows():
            if not isinstance(row, RejectedRow):
                row.pop(ITEM_FIELD, None)
            yield row

    def find_record(self) -> dict[str, Any]:
        """Return a record of an annotation file, or the fields of which the first row is made."""
        return super().find_record() if self.annotation_files() else self.find_row_fields()

    def find_row_fields(self) -> dict[str, Any]:
        """Return the fields of which the first row is made; {} without rows."""
        records: list[dict[str, Any]] = []
        build_row = self.build_row

        def record_fields(key: str, fields: Mapping[str, Any], *rest: Any) -> Row:
            records.append(dict(fields))
            return build_row(key, fields, *rest)

        self.build_row = record_fields  # type: ignore[method-assign, assignment]
        try:
            next((row for row in self.rows(SourceArchives.none()) if records), None)
        finally:
            del self.build_row
        return records[0] if records else {}

    def build_row(
        self,
        key: str,
        fields: Mapping[str, Any],
        reference: MediaRef | None,
        split: str | None,
        split_key: str | None = None,
    ) -> Row:
        """Return a raw row.

        Args:
            key: key of the row.
            fields: fields of the record.
            reference: the media file, None for text and code.
            split: the split that the corpus defines for the row.
            split_key: value that decides a split that is made; by default the key.

        Raises:
            UnwantedRowError: a media file has no captions or transcript.
            ValueError: a field is missing or cannot be used; the text is the reason.
        """
        split = split or self._read_split(fields)
        unlabelled = (self.test_unlabelled and split == "test") or self._is_extra_row(split, fields)
        targets = {} if unlabelled else self._read_targets(fields)
        label = targets.pop("label", None)
        if "pairs" in self.annotations_present and split is None:
            split_key = str(
                read_field(fields, self.label_field) or ""
            )  # an item stays in one split
        final = UNLABELLED if unlabelled else self.assign_split(split, split_key or key, fields)
        if self._reads_strings:
            row = self._build_text_row(final, key, fields, label)
            row.update(targets)
            row["unit"] = self._read_unit(fields)
            return row
        if reference is None:
            raise ValueError("no media file")
        captions: list[str] = []
        transcript = None
        value = _unwrap_captions(read_field(fields, self.text_field))
        if "captions" in self.annotations_present:
            if unlabelled or _is_blank(value):
                raise UnwantedRowError(f"{self.modality_files.noun} without captions")
            captions = clean_captions(value)
        if "transcripts" in self.annotations_present:
            if unlabelled or _is_blank(value):
                raise UnwantedRowError(f"{self.modality_files.noun} without a transcript")
            transcript = normalize_transcript(clean_text(value))
        unit = self._read_unit(fields, split_key)
        return media_row(final, key, reference, captions, transcript, label, unit) | targets

    def assign_split(self, split: str | None, key: str, fields: Mapping[str, Any]) -> str:
        """Return the final split of a row; missing splits are made from the others.

        Args:
            split: the split that the corpus defines for the row.
            key: value that decides a split that is made, unless ``options.split_by`` is set.
            fields: fields of the record.
        """
        options, named = self.options, self.named_splits & ALL_SPLITS
        if options.split_by is not None:
            value = read_field(fields, options.split_by)
            if value is None and (split is None or not named >= {"validation", "test"}):
                raise ValueError(f"no field {options.split_by}, which splits are made by")
            # All rows with this value get the same split.
            key = str(value)
        if split is not None and split not in ALL_SPLITS:
            return split
        if split is None or named <= {"train"}:
            return hash_split(key, options)
        if split == "validation" and "test" not in named:
            return val_or_test(key)
        # The test is given; only the validation is taken from the training rows.
        if split == "train" and "validation" not in named:
            share = stable_hash("split", key) / 2**64
            return "validation" if share < options.validation else "train"
        return split

    def _is_extra_row(self, split: str | None, fields: Mapping[str, Any]) -> bool:
        """Return whether a row has no label and is in a split of another name, as in IMDB."""
        if split is None or split in ALL_SPLITS or not self._has_labels_only():
            return False
        value = read_field(fields, self.label_field)
        return is_empty_value(value) or is_minus_one(value)

    def _read_split(self, fields: Mapping[str, Any]) -> str | None:
        if self.split_field is None:
            return None
        split = parse_split_name(read_field(fields, self.split_field))
        if split is None:
            raise ValueError("a split that is not train, validation or test")
        return split

    def _read_unit(self, fields: Mapping[str, Any], item: str | None = None) -> str | None:
        """Return the name of the unit of a row: of ``split_by``, the speaker or the media file."""
        name = self.options.split_by or _find_speaker_field(tuple(fields))
        name = self.label_field if "pairs" in self.annotations_present else name
        value = read_field(fields, name)
        if is_empty_value(value) or isinstance(value, list | dict):
            # Captions of one media file become one row.
            value = None if "captions" in self.annotations_present else item
        return None if value is None else make_key(value)

    def _has_labels_only(self) -> bool:
        return len(self.annotations_present) == 1 and self.annotations_present[0] in LABELLED

    def _read_targets(self, fields: Mapping[str, Any]) -> Row:
        """Return the class, the classes or the number of a row, by raw column."""
        value = read_field(fields, self.label_field)
        if "label_sets" in self.annotations_present:
            return {"label_set": read_label_set(value, self.options.separator)}
        if "values" in self.annotations_present:
            return {"value": read_number(value)}
        if "pairs" in self.annotations_present:
            return {"group": hash_caption_group([self._read_label(fields)])}
        return {"label": self._read_label(fields)} if "labels" in self.annotations_present else {}

    def _read_label(self, fields: Mapping[str, Any]) -> str:
        value = read_field(fields, self.label_field)
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if isinstance(value, list) and value:
            raise ValueError("several labels; the option task label_sets reads them")
        if is_empty_value(value) or isinstance(value, dict | list):
            raise ValueError("no label")
        return clean_text(str(value))

    def _build_text_row(
        self, split: str, key: str, fields: Mapping[str, Any], label: str | None
    ) -> Row:
        row: Row = {"split": split, "key": key, "group": -1, "label": label, "captions": []}
        content = find_modality(self.modality).content_column
        if self._reads_texts:
            row[content] = self._join_texts(fields)
            return row
        name = find_field(fields, self.modality_files.row_fields)
        row[content] = clean_text(read_field(fields, name))
        if "captions" in self.annotations_present:
            value = _unwrap_captions(read_field(fields, self.text_field))
            blank = _is_blank(value) or split == UNLABELLED
            captions = [] if blank else [first_paragraph(c) for c in clean_captions(value)]
            if _is_blank(captions):
                raise UnwantedRowError("a function without a docstring")
            row["captions"] = clean_captions(captions)
            row["group"] = hash_caption_group(row["captions"])
        return row

    def _join_texts(self, fields: Mapping[str, Any]) -> str:
        """Return the text of a row; of several fields, blank ones are left out."""
        values = [read_field(fields, name) for name in self.text_fields]
        if len(values) == 1:
            return clean_text(values[0])
        values = [value for value in values if not is_empty_value(value)] or [""]
        return "\n".join(clean_text(value) for value in values)


@lru_cache(maxsize=256)
def _find_speaker_field(names: tuple[str, ...]) -> str | None:
    """Return the field of the speaker; most rows of a corpus have the same fields."""
    return find_field(names, SPEAKER_FIELDS)


def _unwrap_captions(value: Any) -> Any:
    """Return captions as texts: some corpora write them as ``[{"raw": …}]``."""
    if isinstance(value, list):
        return [v.get("raw", v.get("text")) if isinstance(v, dict) else v for v in value]
    return value


def _is_blank(value: Any) -> bool:
    """Return whether a text, or every text of a list, is missing or blank."""
    texts = value if isinstance(value, list) else [value]
    return all(text is None or (isinstance(text, str) and not text.strip()) for text in texts)


def detect_strings(fields: Collection[str]) -> str:
    """Return the modality of rows without media: that of a common field of rows, else texts.

    Args:
        fields: names of the fields.
    """
    for modality in list_modalities():
        if modality.reads_tokens and find_field(fields, modality.file_half.row_fields):
            return modality.name
    return CAPTION_MODALITY


def parse_split_name(name: Any) -> str | None:
    """Return the split that a name denotes (``"Val", "val2017" -> "validation"``), or None."""
    found = _SPLIT_NAME.fullmatch(str(name).strip().lower())
    return SPLIT_NAMES[found[1]] if found else None


def parse_split_prefix(name: str) -> str | None:
    """Return the split at the start of a name (``"train-00000.tar" -> "train"``), or None."""
    found = _SPLIT_PREFIX.match(name.lower())
    return SPLIT_NAMES[found[1]] if found else None


def _choose_field(
    names: list[str],
    wanted: str | None,
    filled: Collection[str],
    common: Iterable[str],
    option: str,
) -> str | None:
    """Return the field that an option names, or the first common name among the filled ones."""
    if wanted is not None:
        return match_field(names, wanted, option)
    return find_field(filled, common, option)


def file_extension(name: str) -> str:
    """Return the ending of a file name in small letters: ``"a/b.JPG" -> "jpg"``."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()
