"""What ``folder``, ``webdataset`` and ``hf_dataset`` share: any modality, fields found by name."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipelines.corpora.base import Row, stable_hash
from pipelines.corpora.formats.schema_sample import SchemaSample, is_empty_value
from pipelines.corpora.readers.base import (
    ExternalCorpus,
    MediaOptions,
    NoAnnotationError,
    clean_captions,
    clean_text,
    hash_caption_group,
    hash_split,
    media_row,
    normalize_transcript,
    val_or_test,
)
from pipelines.corpora.readers.columns import (
    CaptionOptions,
    CodeOptions,
    ImageOptions,
    SoundOptions,
    SplitOptions,
    TextOptions,
    VideoOptions,
)
from pipelines.io.media import MediaRef
from pipelines.transforms.code import first_paragraph
from skillnet_platform import console
from skillnet_platform.errors import UserError, nearest

#: Endings of media files, and what they are.
MEDIA_EXTENSIONS = {
    "sound": ("wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "wma", "amr", "aif",
              "aiff"),
    "image": ("jpg", "jpeg", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "svg"),
    "video": ("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "3gp", "flv", "wmv"),
}  # fmt: skip
MODALITY_OF_EXTENSION = {
    ending: modality for modality, each in MEDIA_EXTENSIONS.items() for ending in each
}
MEDIA_NOUNS = {"sound": "a recording", "image": "a picture", "video": "a clip"}
#: Usual names of fields, the likeliest first.
CODE_FIELDS = ("code", "function", "func_code_string", "original_string")
CAPTION_FIELDS = ("captions", "caption", "sentences", "docstring", "description", "text", "txt")
TRANSCRIPT_FIELDS = ("transcription", "transcript", "sentence", "text", "txt")
TEXT_FIELDS = ("text", "sentence", "txt", "content")
LABEL_FIELDS = ("label", "labels", "cls", "class", "category", "intent")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
ALL_SPLITS = frozenset(SPLIT_NAMES.values())
#: Where the rows of a test go that says nothing of them: for prediction.
UNLABELLED = "unlabelled"


@dataclass
class RecordOptions(
    SplitOptions,
    TextOptions,
    CaptionOptions,
    SoundOptions,
    ImageOptions,
    VideoOptions,
    CodeOptions,
    MediaOptions,
):
    """A corpus of any modality.

    Args:
        modality: text, sound, image, video or code; by default what the first rows show.
        text: field of the text, the transcript or the captions; by default a usual name.
        label: field of the class, for classification; by default a usual name.
        split: field that names each row's split; by default ``split``, in metadata that name none.
        split_by: field whose values stay on one side of a split that is made: the speaker,
            the source of a clip.
        task: "labels" to classify, "captions" or "transcripts" to pair with texts, where rows
            have both.
    """

    modality: Literal["text", "sound", "image", "video", "code"] | None = None
    text: str | None = None
    label: str | None = None
    split: str | None = None
    split_by: str | None = None
    task: Literal["labels", "captions", "transcripts"] | None = None


class RecordCorpus(ExternalCorpus):
    """Rows are mappings of fields, beside a media file or without one."""

    Options = RecordOptions
    captions_equivalent = True
    #: Splits that the corpus names.
    named_splits: frozenset[str] = frozenset()
    text_field: str | None = None
    label_field: str | None = None
    #: Field that names the split of each row.
    split_field: str | None = None
    #: The test says nothing of its rows: it is none to evaluate by.
    test_unlabelled: bool = False

    def infer_schema(
        self, fields: Iterable[str], ending: str | None, held: Collection[str] | None = None
    ) -> None:
        """Choose modality and fields by the rows' field names and the ending of their media files.

        Args:
            fields: names of all fields.
            ending: of the media files; none where there are none.
            held: fields that hold a value in any row looked at: usual names count among these
                alone. By default all.

        Raises:
            UserError: the rows show no modality, or have no field to learn from.
        """
        names, options = list(fields), self.options
        held = names if held is None else held
        own = "code" if _first(held, CODE_FIELDS) and ending is None else "text"
        self.modality = options.modality or (
            MODALITY_OF_EXTENSION.get(ending, "") if ending else own
        )
        if not self.modality:
            raise UserError(
                f"{self.source.uri}: cannot tell the modality of .{ending} files; give "
                f"--options.{self.name}.modality"
            )
        usual = {"text": TEXT_FIELDS, "sound": TRANSCRIPT_FIELDS}.get(self.modality, CAPTION_FIELDS)
        self.text_field = _named(names, options.text, held, usual, f"options.{self.name}.text")
        self.label_field = _named(
            names, options.label, held, LABEL_FIELDS, f"options.{self.name}.label"
        )
        for key in ("split", "split_by"):
            _named(names, getattr(options, key), (), (), f"options.{self.name}.{key}")
        pair = "transcripts" if self.modality == "sound" else "captions"
        found = [pair] * (self.modality != "text" and self.text_field is not None)
        found += ["labels"] * (self.label_field is not None)
        if options.task is not None:
            if options.task not in found:
                raise UserError(
                    f"options.{self.name}.task: rows have no {options.task}; they have "
                    f"{', '.join(names) or 'no fields'}"
                )
            found = [options.task]
        if self.modality == "text" and self.text_field is None:
            raise UserError(
                f"{self.source.uri}: no field of texts among {', '.join(names) or 'none'}; give "
                f"--options.{self.name}.text"
            )
        if not found and held:
            console.warn(
                f"{self.source.uri}: neither captions nor labels among the fields "
                f"{', '.join(held)}: rows are read without them, for pretraining. If a field holds "
                "them, name it: "
                f"--options.{self.name}.text FIELD, or --options.{self.name}.label FIELD"
            )
        self.annotations_present = tuple(found)
        self.split_field = options.split

    def resolve_test_split(self, glance: SchemaSample) -> None:
        """Take a test whose rows have neither labels nor captions for none.

        Its labels are what a competition asks for. Rows to classify become the split
        ``unlabelled``; media without captions or transcripts are set aside. A test to evaluate by
        is made, as where none is given.
        """
        asked = [
            self.label_field if what == "labels" else self.text_field
            for what in self.annotations_present
        ]
        if "test" not in self.named_splits or not asked:
            return
        if not any(glance.has_value("test", field) for field in asked if field is not None):
            self.mark_test_unlabelled()

    def mark_test_unlabelled(self) -> None:
        """The test says nothing of its rows."""
        self.test_unlabelled, self.named_splits = True, self.named_splits - {"test"}
        self.unlabelled_splits = (UNLABELLED,) if self.annotations_present == ("labels",) else ()

    def build_row(
        self,
        key: str,
        fields: Mapping[str, Any],
        reference: MediaRef | None,
        split: str | None,
        drawn_by: str | None = None,
    ) -> Row:
        """A raw row.

        Args:
            key: of the row.
            fields: its fields.
            reference: its media file, unless it is text or code.
            split: the split that the corpus names for it.
            drawn_by: what a split that is made hangs on, if not the key.

        Raises:
            NothingSaid: a medium has no captions, or no transcript.
            ValueError: a field is missing or of no use; says which.
        """
        split = split or self._named_split(fields)
        untold = self.test_unlabelled and split == "test"
        label = self._label(fields) if "labels" in self.annotations_present and not untold else None
        home = UNLABELLED if untold else self.assign_split(split, drawn_by or key, fields)
        if self.modality in ("text", "code"):
            return self._written(home, key, fields, label)
        if reference is None:
            raise ValueError("no media file")
        captions: list[str] = []
        text = None
        said = _listed(fields.get(self.text_field or ""))
        if "captions" in self.annotations_present:
            if untold or _is_empty(said):
                raise NoAnnotationError(f"{MEDIA_NOUNS[self.modality]} without captions")
            captions = clean_captions(said)
        if "transcripts" in self.annotations_present:
            if untold or _is_empty(said):
                raise NoAnnotationError("a recording without a transcript")
            text = normalize_transcript(clean_text(said))
        return media_row(home, key, reference, captions, text, label)

    def assign_split(self, split: str | None, key: str, fields: Mapping[str, Any]) -> str:
        """The split of a row: as named; what the corpus lacks is made of the others."""
        options = self.options
        if options.split_by is not None:
            value = fields.get(options.split_by)
            if value is None and (split is None or not self.named_splits >= {"validation", "test"}):
                raise ValueError(f"no field {options.split_by}, which splits are made by")
            key = str(value)
        if split is None or self.named_splits <= {"train"}:
            return hash_split(key, options)
        if split == "validation" and "test" not in self.named_splits:
            return val_or_test(key)
        if split == "train" and "validation" not in self.named_splits:
            share = stable_hash("split", key) / 2**64
            return "validation" if share < options.validation else "train"
        return split

    def _named_split(self, fields: Mapping[str, Any]) -> str | None:
        if self.split_field is None:
            return None
        named = parse_split_name(fields.get(self.split_field))
        if named is None:
            raise ValueError("a split that is none of train, validation, test")
        return named

    def _label(self, fields: Mapping[str, Any]) -> str:
        value = fields.get(self.label_field or "")
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if is_empty_value(value) or isinstance(value, list | dict):
            raise ValueError("no label")
        return clean_text(str(value))

    def _written(self, split: str, key: str, fields: Mapping[str, Any], label: str | None) -> Row:
        row: Row = {"split": split, "key": key, "group": -1, "label": label, "captions": []}
        if self.modality == "text":
            return row | {"text": clean_text(fields.get(self.text_field or ""))}
        name = _first(list(fields), CODE_FIELDS)
        row["code"] = clean_text(fields.get(name or ""))
        if "captions" in self.annotations_present:
            said = _listed(fields.get(self.text_field or ""))
            empty = _is_empty(said) or split == UNLABELLED
            captions = [] if empty else [first_paragraph(c) for c in clean_captions(said)]
            if _is_empty(captions):
                raise NoAnnotationError("a function without a docstring")
            row["captions"] = clean_captions(captions)
            row["group"] = hash_caption_group(row["captions"])
        return row


def _listed(value: Any) -> Any:
    """Captions, however they are written: ``[{"raw": …}]`` occurs."""
    if isinstance(value, list):
        return [v.get("raw", v.get("text")) if isinstance(v, dict) else v for v in value]
    return value


def _is_empty(said: Any) -> bool:
    """Whether there are no words in a text, or in any of some texts."""
    listed = said if isinstance(said, list) else [said]
    return all(text is None or (isinstance(text, str) and not text.strip()) for text in listed)


def parse_split_name(name: Any) -> str | None:
    """``"Val" -> "validation"``; none if it names no split."""
    return SPLIT_NAMES.get(str(name).strip().lower())


def parse_split_prefix(name: str) -> str | None:
    """``"train-00000.tar" -> "train"``: the split that a name begins with."""
    lower = name.lower()
    for known, split in SPLIT_NAMES.items():
        if lower == known or lower.startswith((f"{known}-", f"{known}_", f"{known}.")):
            return split
    return None


def _first(names: Collection[str], usual: Iterable[str]) -> str | None:
    return next((name for name in usual if name in names), None)


def _named(
    names: list[str],
    wanted: str | None,
    held: Collection[str],
    usual: Iterable[str],
    where: str,
) -> str | None:
    if wanted is not None and wanted not in names:
        near = nearest(wanted, names)
        more = near if "did you mean" in near else f"; rows have {', '.join(names) or 'none'}"
        raise UserError(f"{where}: no field {wanted!r}{more}")
    return wanted or _first(held, usual)


def file_extension(name: str) -> str:
    """``"a/b.JPG" -> "jpg"``."""
    return name.rpartition("/")[2].rpartition(".")[2].lower()
