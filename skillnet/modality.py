"""Modalities by name: :func:`find_modality`. A modality owns its whole life.

A :class:`Modality` is a light declaration, because configurations are checked with it. It names two
halves, which load with their first use:

* ``tensors``: a :class:`skillnet.modalities.tensors.ModalityTensors`: stem, lengths, batches,
  augmentation and masks;
* ``files``: a ``pipelines.data.modalities.base.ModalityFiles``: reader options, columns of shards,
  decoding, raw inputs of predictions and previews.

A third party adds a modality through the entry point group ``skillnet.modalities``, whose entries
name a :class:`Modality`. This module is pure Python without torch.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from skillnet.bounds import nearest_hint, require_fields
from skillnet_files.entry_points import find_entries, load_named

GROUP = "skillnet.modalities"

#: Modality of captions, transcripts and queries in words.
CAPTION_MODALITY = "text"


@dataclass(frozen=True)
class FileSignature:
    """First bytes of the files of one format.

    Args:
        format: name of the format.
        first: bytes at the start; ``b""`` for any.
        offset: position of ``following``.
        following: further bytes.
    """

    format: str
    first: bytes
    offset: int = 0
    following: bytes = b""

    def matches(self, data: bytes) -> bool:
        """Return whether bytes start like a file of the format.

        Args:
            data: the first 16 bytes of a file, or more.
        """
        return data.startswith(self.first) and data.startswith(self.following, self.offset)


@dataclass(frozen=True)
class InputSize:
    """Size of the model's inputs that the preparation of a corpus decides.

    Args:
        key: name of the model's configuration.
        option: name of the reader, and of the manifest's preprocessing settings.
        factor: units of the model per unit of the option.
        is_limit: whether the model may read longer rows; otherwise both sizes are equal.
    """

    key: str
    option: str
    factor: int = 1
    is_limit: bool = False


@dataclass(frozen=True)
class Modality:
    """Declaration of a modality.

    Args:
        name: as in configurations, manifests and saved models.
        stem: name of the stem in saved models. Modalities of one stem share its weights.
        tensors: ``module:Class`` of the tensor half.
        files: ``module:Class`` of the file half.
        column: column of the shards that the model reads.
        batch: names of the tensors of a batch: the values, then their lengths if they are padded.
        content: column with the content of a row, to compare rows; by default ``column``.
        extensions: endings of its files in small letters, the usual one first.
        signatures: first bytes of its files. Those of earlier modalities are tried first.
        reads_tokens: whether a row is a string, read as ids of the vocabulary; otherwise a file.
        has_linear_path: whether :mod:`skillnet.linear_path` can read it.
        has_class_token: whether ``model.class_token`` adds a token to its rows.
        sizes: sizes of the model that the preparation decides.
        options: dataclass of the sizes of another package's modality. A configuration gives them
            as ``model.inputs.NAME``.
        transcript_task: name of the CTC task of rows with a transcript; "" if a text beside a row
            is a caption.
        specialists: architectures of libraries that read it; the first one is the default.
        masked_fraction: fraction of the tokens that a masked task hides, unless the masks of the
            run state it.
    """

    name: str
    stem: str
    tensors: str
    files: str
    column: str
    batch: tuple[str, ...]
    content: str = ""
    extensions: tuple[str, ...] = ()
    signatures: tuple[FileSignature, ...] = ()
    reads_tokens: bool = False
    has_linear_path: bool = False
    has_class_token: bool = False
    sizes: tuple[InputSize, ...] = ()
    options: type | None = None
    transcript_task: str = ""
    specialists: tuple[str, ...] = ()
    masked_fraction: float = 0.5

    @property
    def paired_annotation(self) -> str:
        """Annotation that a text beside a row is: "transcripts" or "captions"."""
        return "transcripts" if self.transcript_task else "captions"

    @property
    def content_column(self) -> str:
        """Column with the content of a row, as a model gets it but without truncation of texts."""
        return self.content or self.column

    @cached_property
    def tensor_half(self) -> Any:
        """The :class:`skillnet.modalities.tensors.ModalityTensors`; importing it imports torch."""
        return pkgutil.resolve_name(self.tensors)(self)

    @cached_property
    def file_half(self) -> Any:
        """The ``pipelines.data.modalities.base.ModalityFiles``; importing it imports Arrow."""
        return pkgutil.resolve_name(self.files)(self)

    def list_sizes(self, settings: Mapping[str, Any]) -> dict[str, int]:
        """Return key of the model -> size that it must have to read the rows of a corpus.

        Args:
            settings: preprocessing of the corpus.
        """
        sizes = (size for size in self.sizes if not size.is_limit and size.option in settings)
        return {size.key: size.factor * settings[size.option] for size in sizes}

    def read_size(self, config: Any, key: str) -> Any:
        """Return a size of a model.

        Args:
            config: ``SkillNetConfig`` of the model.
            key: name of the size; ``inputs.NAME.KEY`` for one of ``options``.
        """
        *path, name = key.split(".")
        owner = self.build_options(config.inputs.get(self.name, {})) if path else config
        return getattr(owner, name)

    def build_options(self, given: Mapping[str, Any]) -> Any:
        """Return the sizes that a configuration gives, as an instance of ``options``.

        Args:
            given: option -> value.

        Raises:
            ValueError: an unknown option, with the nearest one, or an invalid value.
        """
        where = f"model.inputs.{self.name}"
        require_fields(given, self.options, where)
        try:
            return self.options(**given) if self.options else None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


_BUILT_IN = (
    Modality(
        "text",
        "token",
        "skillnet.modalities.tokens:TextTensors",
        "pipelines.data.modalities.text:TextFiles",
        column="tokens",
        batch=("tokens",),
        content="text",
        extensions=("txt",),
        reads_tokens=True,
        has_linear_path=True,
        sizes=(InputSize("max_tokens", "max_tokens", is_limit=True),),
        specialists=("bert", "roberta"),
    ),
    Modality(
        "image",
        "patch",
        "skillnet.modalities.pixels:ImageTensors",
        "pipelines.data.modalities.image:ImageFiles",
        column="pixels",
        batch=("pixels",),
        extensions=(
            *("jpg", "jpeg", "jfif", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "svg"),
            *("heic", "heif"),
        ),
        signatures=(
            FileSignature("JPEG", b"\xff\xd8\xff"),
            FileSignature("PNG", b"\x89PNG\r\n\x1a\n"),
            FileSignature("GIF", b"GIF8"),
            FileSignature("BMP", b"BM", 6, bytes(4)),
            FileSignature("TIFF", b"II*\0"),
            FileSignature("TIFF", b"MM\0*"),
            FileSignature("WebP", b"RIFF", 8, b"WEBP"),
            FileSignature("AVIF", b"", 4, b"ftypavi"),
            FileSignature("SVG", b"<svg"),
        ),
        has_linear_path=True,
        has_class_token=True,
        sizes=(InputSize("image_size", "size"),),
        specialists=("vit",),
    ),
    Modality(
        "sound",
        "log_mel",
        "skillnet.modalities.sound:SoundTensors",
        "pipelines.data.modalities.sound:SoundFiles",
        column="log_mel",
        batch=("log_mel", "frames"),
        extensions=(
            *("wav", "mp3", "flac", "ogg", "oga", "opus", "m4a", "aac", "wma", "amr", "aif"),
            "aiff",
        ),
        signatures=(
            FileSignature("WAV", b"RIFF", 8, b"WAVE"),
            FileSignature("AIFF", b"FORM", 8, b"AIF"),
            FileSignature("FLAC", b"fLaC"),
            FileSignature("Ogg", b"OggS"),
            FileSignature("MP3", b"ID3"),
            # An MP3 file without an ID3 tag starts with the sync bits of a frame.
            FileSignature("MP3", b"\xff\xfb"),
            FileSignature("MP3", b"\xff\xf3"),
            FileSignature("MP3", b"\xff\xf2"),
            FileSignature("AMR", b"#!AMR"),
            FileSignature("M4A", b"", 4, b"ftypM4A"),
        ),
        sizes=(InputSize("max_frames", "max_seconds", 100, is_limit=True),),
        transcript_task="speech_recognition",
        specialists=("speech2text", "ast"),
    ),
    Modality(
        "video",
        "tubelet",
        "skillnet.modalities.pixels:VideoTensors",
        "pipelines.data.modalities.video:VideoFiles",
        column="frames",
        batch=("frames",),
        extensions=(
            *("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "3gp", "flv", "wmv"),
        ),
        signatures=(
            FileSignature("MOV", b"", 4, b"ftypqt"),
            FileSignature("MP4", b"", 4, b"ftyp"),
            FileSignature("AVI", b"RIFF", 8, b"AVI "),
            FileSignature("Matroska or WebM", b"\x1aE\xdf\xa3"),
        ),
        sizes=(InputSize("video_frames", "frames"), InputSize("video_size", "video_size")),
        specialists=("videomae",),
    ),
    Modality(
        "code",
        "token",
        "skillnet.modalities.tokens:CodeTensors",
        "pipelines.data.modalities.code:CodeFiles",
        column="tokens",
        batch=("tokens",),
        content="code",
        extensions=("py", "pyi"),
        reads_tokens=True,
        has_linear_path=True,
        sizes=(InputSize("max_tokens", "max_code_tokens", is_limit=True),),
        specialists=("bert", "roberta"),
    ),
)
BUILT_IN_MODALITIES: Mapping[str, Modality] = {each.name: each for each in _BUILT_IN}

#: Stems in the order of initialization, which decides the random weights. Others follow by name.
_STEM_ORDER = ("token", "patch", "tubelet", "log_mel")


def modality_names() -> tuple[str, ...]:
    """Return the names of all installed modalities, the built-in ones first."""
    others = find_entries(GROUP).keys() - BUILT_IN_MODALITIES.keys()
    return (*BUILT_IN_MODALITIES, *sorted(others))


@cache
def find_modality(name: str) -> Modality:
    """Return the modality of a name.

    Args:
        name: as in configurations and manifests.

    Raises:
        ValueError: no modality has this name (with the nearest one), or its entry point does not
            name a :class:`Modality` of the same name.
    """
    # Saved models and prepared corpora rely on the meaning of built-in names.
    if name in BUILT_IN_MODALITIES:
        return BUILT_IN_MODALITIES[name]
    found = load_named(GROUP, name, Modality)
    if found is None:
        raise ValueError(f"unknown modality {name!r}{nearest_hint(name, modality_names())}")
    return found


def list_modalities() -> list[Modality]:
    """Return all installed modalities, the built-in ones first."""
    return [find_modality(name) for name in modality_names()]


def is_string_modality(name: str | None) -> bool:
    """Return whether a modality that a user chose reads strings, such as texts, and no files.

    Args:
        name: name of the modality, or None without a choice.
    """
    return name is not None and find_modality(name).reads_tokens


def is_media_modality(name: str | None) -> bool:
    """Return whether a modality that a user chose reads files; see :func:`is_string_modality`."""
    return name is not None and not find_modality(name).reads_tokens


def stem_names() -> list[str]:
    """Return the names of the stems of all installed modalities, in the order of initialization."""
    found = {each.stem for each in list_modalities()}
    return [*_STEM_ORDER, *sorted(found - set(_STEM_ORDER))]


def find_stem(name: str) -> Any:
    """Return the class of a stem: a module that is built from the configuration of the model.

    Args:
        name: name of the stem.

    Raises:
        ValueError: no installed modality has this stem.
    """
    for each in list_modalities():
        if each.stem == name:
            return each.tensor_half.stem_class
    raise ValueError(f"unknown stem {name!r}{nearest_hint(name, stem_names())}")
