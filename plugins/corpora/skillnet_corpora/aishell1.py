"""AISHELL-1: Mandarin read aloud by 400 speakers, 16 kHz mono, with transcripts.

    data_aishell/transcript/aishell_transcript_v0.8.txt     <utterance> <words by spaces>
    data_aishell/wav/{train,dev,test}/S0002/BAC009S0002W0122.wav
    data_aishell/wav/{train,dev,test}/S0002.tar.gz           a speaker that is not unpacked
    data_aishell/wav/S0002.tar.gz                            holding train/S0002/….wav
    data_aishell/wav/S0002/….wav                             no splits: made, by speaker

Archives of speakers are read in place. If an utterance also exists as a file, the file is used.
Words are joined, so error rates count characters. The symbols are the characters of the training
speakers' transcripts, and ``<unk>`` for characters that only other speakers say.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.data.corpora.base import Row, list_archives
from pipelines.data.corpora.formats.encoding import DAMAGED_COMPRESSION, BadRecord
from pipelines.data.corpora.readers.base import (
    ExternalCorpus,
    FileRecord,
    MediaOptions,
    SplitOptions,
)
from pipelines.data.corpora.readers.row_builders import (
    UnwantedRowError,
    clean_text,
    hash_split,
    make_key,
    media_row,
    normalize_transcript,
)
from pipelines.data.io.archive import TarReader, TarReadError
from pipelines.data.io.directory import DAMAGE_ERRORS, SourceDirectory
from pipelines.data.io.media import MediaRef
from pipelines.data.io.source_file import PER_FILE_ERRORS, open_stream
from pipelines.data.modalities.sound import SoundOptions
from skillnet_corpora.readers.fields import parse_split_name
from skillnet_corpora.readers.unread_files import missing_format_error
from skillnet_platform.errors import UserError

SPEAKER_ARCHIVES = (".tar.gz", ".tgz")
_TRANSCRIPT_NAME = re.compile(r"aishell_transcript.*\.txt(\.gz)?$")
_ROOT = "data_aishell/"
#: Name of the download of the entire corpus.
_DOWNLOAD_NAME = re.compile(r"(data_)?aishell([-_]?1)?\.\w", re.IGNORECASE)
#: Shares of the splits if none are given.
_DEFAULT_SHARES = SplitOptions()


@dataclass
class AishellOptions(MediaOptions, SoundOptions):
    """AISHELL-1: the options of audio."""


class AishellCorpus(ExternalCorpus):
    """Utterances with their transcripts.

    Attributes:
        transcript: path of the transcript file.
        wav: folder of the speakers in ``media_source``.
        makes_splits: whether no splits are given, so that a hash assigns each speaker to one.
    """

    name = "aishell1"
    modality = "sound"
    Options = AishellOptions
    annotations_present = ("transcripts",)
    version = 3  # folders of speakers beside split folders are read

    @classmethod
    def detect(cls, source: SourceDirectory) -> str | None:
        """Return the transcript file as evidence, or the archive of the corpus."""
        found = _find_transcript(source)
        if found:
            return f"{found} is the transcript of AISHELL-1"
        if above := _find_corpus_above(source):
            return f"it is a part of AISHELL-1, which is {above}"
        archives = list_archives(source)
        archive = next((name for name in archives if _DOWNLOAD_NAME.match(name)), None)
        return f"{archive} is an archive of AISHELL-1" if archive else None

    def discover(self) -> None:
        """Find transcript and audio."""
        found = _find_transcript(self.source)
        if found is None:
            if above := _find_corpus_above(self.source):
                raise UserError(f"{self.source.uri}: only a part of AISHELL-1; give {above}")
            raise missing_format_error(
                self.source,
                "no transcript/aishell_transcript_v0.8.txt in it; AISHELL-1 is a folder "
                "data_aishell with transcript and wav",
            )
        self.transcript = found
        root = found.rpartition("transcript/")[0]
        media = self.options.media
        self.media_source = SourceDirectory(media) if media else self.source
        self.wav = "" if media else f"{root}wav"
        if not self.media_source.exists(self.wav):
            raise UserError(
                f"{self.media_source.uri}/{self.wav}: no such folder; it must contain the audio"
            )
        speakers = self._list_speakers()
        if not speakers:
            raise UserError(
                f"{self.media_source.path(self.wav)}: no folders or archives of speakers in it; "
                "expected train/S0002/BAC009S0002W0122.wav, or S0002/…"
            )
        self.makes_splits = all(
            (split or self._split_in_archive(path)) is None for split, path in speakers
        )

    def annotation_files(self) -> list[str]:
        """Return the transcript file."""
        return [self.transcript]

    def scan_labels(self) -> None:
        """Collect the characters of the training speakers, without listing their audio."""
        speakers = set()
        for split, path in self._list_speakers():
            # If splits are made, ``discover`` found none in any archive.
            named = split if split or self.makes_splits else self._split_in_archive(path)
            if self._assign_split(named, path) == "train":
                speakers.add(_speaker_of(path))
        spoken = self._read_transcripts()
        # The utterance BAC009S0002W0122 is of the speaker S0002.
        texts = (text for name, (_, text) in spoken.items() if name[6:11] in speakers)
        self.set_labels((), sorted({c for text in texts if isinstance(text, str) for c in text}))

    def num_source_files(self) -> int:
        """Return the number of folders and archives of speakers."""
        return len(self._list_speakers()) or 1

    def read_records(self) -> Iterator[FileRecord]:
        """Yield utterances in the order of speakers, folders before archives."""
        spoken = self._read_transcripts()
        heard: set[str] = set()
        for name, (number, text) in spoken.items():
            if isinstance(text, BadRecord):
                yield self._report_line(name, number, text)
        unpacked = set()
        for split, path in self._list_speakers():
            speaker = _speaker_of(path)
            if not path.endswith(SPEAKER_ARCHIVES):
                unpacked.add(speaker)
            for name, inside, found in self._iter_audio(path):
                # A damaged archive does not matter if the speaker is unpacked too.
                is_repeated = speaker in unpacked if isinstance(found, BadRecord) else name in heard
                if not is_repeated:
                    named = split or _split_in_path(inside.split("/"))
                    final, origin = self._assign_split(named, path), (speaker, spoken.get(name))
                    yield FileRecord(inside, None, found, final, make_key(inside), origin)
                    heard |= set() if isinstance(found, BadRecord) else {name}
        for name, (number, text) in spoken.items():
            if not isinstance(text, BadRecord) and name not in heard:
                yield self._report_line(name, number, BadRecord("a transcript without audio"))

    def build_record(self, record: FileRecord) -> Row:
        """Return the row of an utterance."""
        speaker, (number, text) = record.origin[0], record.origin[1] or (None, None)
        if record.split is None:
            raise ValueError("neither train, dev nor test in its path")
        if not isinstance(text, str):
            # Rejected by choice: 360 utterances of the corpus have no transcript.
            raise UnwantedRowError("audio without a transcript")
        unit = make_key(speaker)
        row = media_row(record.split, record.key, record.value, text=text, unit=unit)
        return row | {"file": self.transcript, "row": number}

    def _report_line(self, name: str, number: int, problem: BadRecord) -> FileRecord:
        return FileRecord(self.transcript, number, problem, key=make_key("transcript", name))

    def _assign_split(self, named: str | None, path: str) -> str | None:
        """Return the split of a speaker: as named, or made of the speaker's name alone."""
        if named is None and self.makes_splits:
            return hash_split(_speaker_of(path), _DEFAULT_SHARES)
        return named

    def _split_in_archive(self, path: str) -> str | None:
        """Return the split that the first member of a speaker's archive names, or None."""
        if path.endswith(SPEAKER_ARCHIVES):
            # ``rows`` reports an archive that cannot be read.
            with contextlib.suppress(TarReadError, *PER_FILE_ERRORS):
                first = next(_iter_tar_names(self.media_source, path), "")
                return _split_in_path(first.split("/"))
        return None

    def _read_transcripts(self) -> dict[str, tuple[int, str | BadRecord]]:
        """Return utterance -> (number of its line, text or why the line cannot be used).

        The entire corpus takes about 30 MB of memory.
        """
        found: dict[str, tuple[int, str | BadRecord]] = {}
        number = 0
        try:
            for number, line in self.source.lines(self.transcript):
                # Some copies have a tab after the name.
                name, words, *_ = [*line.decode("utf-8", "replace").split(maxsplit=1), "", ""]
                try:
                    found[name] = number, normalize_transcript(clean_text(words))
                except ValueError:
                    found[name] = number, BadRecord("an empty or damaged transcript")
        except DAMAGE_ERRORS:
            found[f"line {number + 1}"] = number + 1, DAMAGED_COMPRESSION
        return found

    def _list_speakers(self) -> list[tuple[str | None, str]]:
        """Return (split, path) of every speaker's folder, then of every speaker's archive.

        The split is None where only the members of the archive can name it.
        """
        found: list[tuple[str | None, str]] = []
        for entry in self.media_source.entries(self.wav):
            path = f"{self.wav}/{entry.name}" if self.wav else entry.name
            is_archive = entry.name.endswith(SPEAKER_ARCHIVES)
            if entry.is_folder and (split := parse_split_name(entry.name)):
                for below in self.media_source.entries(path):
                    if below.is_folder or below.name.endswith(SPEAKER_ARCHIVES):
                        found.append((split, f"{path}/{below.name}"))
            elif is_archive or (entry.is_folder and entry.name != "__MACOSX"):
                found.append((None, path))
        return sorted(found, key=lambda speaker: speaker[1].endswith(SPEAKER_ARCHIVES))

    def _iter_audio(self, path: str) -> Iterator[tuple[str, str, MediaRef | BadRecord]]:
        """Yield (utterance, path, reference); a bad record if an archive is damaged."""
        source = self.media_source
        if not path.endswith(SPEAKER_ARCHIVES):
            for entry in source.walk(path):
                if entry.name.lower().endswith(".wav"):
                    yield _utterance_of(entry.name), entry.name, MediaRef(source.path(entry.name))
            return
        archive = source.path(path)
        try:
            for member in _iter_tar_names(source, path):
                if member.lower().endswith(".wav"):
                    reference = MediaRef(archive, member=member)
                    yield _utterance_of(member), f"{path}/{member}", reference
        except TarReadError:
            reason = "the speaker's archive is cut short or damaged"
            yield "", path, BadRecord(reason, truncates_file=True)
        except PER_FILE_ERRORS:
            yield "", path, BadRecord("the speaker's archive cannot be opened", truncates_file=True)


def _utterance_of(path: str) -> str:
    """``"train/S0002/BAC009S0002W0122.wav" -> "BAC009S0002W0122"``."""
    return path.rpartition("/")[2][:-4]


def _speaker_of(path: str) -> str:
    """``"wav/train/S0002.tar.gz" -> "S0002"``."""
    return path.rpartition("/")[2].split(".")[0]


def _find_transcript(source: SourceDirectory) -> str | None:
    if source.is_file:
        return None
    for folder in (f"{above}transcript" for above in ("", _ROOT, _ROOT * 2)):
        if source.exists(folder):
            for entry in source.entries(folder):
                if _TRANSCRIPT_NAME.match(entry.name):
                    return f"{folder}/{entry.name}"
    return None


def _find_corpus_above(source: SourceDirectory) -> str | None:
    """Return the directory of the corpus if ``source`` is ``wav``, ``transcript`` or a split."""
    if source.is_file:
        return None
    uri = source.uri
    for _ in range(2):
        above, _, name = uri.rpartition("/")
        if name in ("wav", "transcript") or parse_split_name(name):
            uri = above
    return uri if uri != source.uri and _find_transcript(SourceDirectory(uri)) else None


def _iter_tar_names(source: SourceDirectory, path: str) -> Iterator[str]:
    """Yield the names of the files of a compressed tar, front to back."""
    archive = source.path(path)
    with open_stream(archive) as stream, contextlib.closing(TarReader(archive, stream)) as tar:
        for entry in tar:
            if not entry.name.rpartition("/")[2].startswith("."):  # macOS adds ``._`` files
                yield entry.name


def _split_in_path(parts: list[str]) -> str | None:
    return next((split for part in parts if (split := parse_split_name(part))), None)
