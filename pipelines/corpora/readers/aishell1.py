"""AISHELL-1: Mandarin read aloud by 400 speakers, 16 kHz mono, with transcripts.

    data_aishell/transcript/aishell_transcript_v0.8.txt     <utterance> <words by spaces>
    data_aishell/wav/{train,dev,test}/S0002/BAC009S0002W0122.wav
    data_aishell/wav/{train,dev,test}/S0002.tar.gz           a speaker not yet unpacked
    data_aishell/wav/S0002.tar.gz                            holding train/S0002/….wav
    data_aishell/wav/S0002/….wav                             no splits: made, by speaker

Speakers that are still archives are read in place; of an utterance that is there unpacked, too, the
unpacked one is taken. Words are joined: error rates are of characters.
The inventory of symbols is that of the training speakers' transcripts, with ``<unk>`` for
characters that only other speakers say.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed import list_archives, missing_format_error
from pipelines.corpora.readers.base import (
    ExternalCorpus,
    MediaOptions,
    clean_text,
    error_row,
    hash_split,
    make_key,
    media_row,
    normalize_transcript,
)
from pipelines.corpora.readers.columns import SoundOptions, SplitOptions
from pipelines.corpora.readers.fields import parse_split_name
from pipelines.io.directory import DAMAGE_ERRORS, SourceDirectory
from pipelines.io.media import MediaRef
from pipelines.io.source_file import PER_FILE_ERRORS, open_stream
from pipelines.io.tar import TarReader, TarReadError
from skillnet_platform.errors import UserError

ARCHIVES = (".tar.gz", ".tgz")
_TRANSCRIPT = re.compile(r"aishell_transcript.*\.txt(\.gz)?$")
_ROOT = "data_aishell/"
#: What the corpus is downloaded as.
_WHOLE = re.compile(r"(data_)?aishell([-_]?1)?\.\w", re.IGNORECASE)
#: Splits are made in these shares where none are given.
_SHARES = SplitOptions()


@dataclass
class AishellOptions(MediaOptions, SoundOptions):
    """AISHELL-1: the options of recordings."""


class AishellCorpus(ExternalCorpus):
    """Utterances, each with its transcript."""

    name = "aishell1"
    modality = "sound"
    Options = AishellOptions
    annotations_present = ("transcripts",)
    version = 3  # folders of speakers beside those of splits are read

    @classmethod
    def detect(cls, place: SourceDirectory) -> str | None:
        """Its transcript file, in it or beside it; or its archive."""
        found = _transcript(place)
        if found:
            return f"{found} is the transcript of AISHELL-1"
        if above := _whole_corpus(place):
            return f"it is a part of AISHELL-1, which is {above}"
        archive = next((name for name in list_archives(place) if _WHOLE.match(name)), None)
        return f"{archive} is an archive of AISHELL-1" if archive else None

    def discover(self) -> None:
        """Find transcript and recordings."""
        found = _transcript(self.source)
        if found is None:
            if above := _whole_corpus(self.source):
                raise UserError(f"{self.source.uri}: a part of AISHELL-1; give the whole, {above}")
            raise missing_format_error(
                self.source,
                "no transcript/aishell_transcript_v0.8.txt in it; AISHELL-1 is a folder "
                "data_aishell with transcript and wav",
            )
        self.transcript = found
        root = found.rpartition("transcript/")[0]
        self.media_source = (
            SourceDirectory(self.options.media) if self.options.media else self.source
        )
        self.wav = "" if self.options.media else f"{root}wav"
        if not self.media_source.exists(self.wav):
            raise UserError(
                f"{self.media_source.uri}/{self.wav}: no such folder; recordings are there"
            )
        speakers = self._speakers()
        if not speakers:
            where = self.media_source.path(self.wav)
            raise UserError(
                f"{where}: no folders of speakers in it, nor their archives; expected "
                "train/S0002/BAC009S0002W0122.wav and alike, or S0002/…"
            )
        #: No splits are given: each speaker falls into one.
        self.made = all((given or self._inner_split(path)) is None for given, path in speakers)

    def annotation_files(self) -> list[str]:
        """The transcript file."""
        return [self.transcript]

    def scan_labels(self) -> None:
        """The characters that training speakers say, without listing their recordings."""
        speakers = set()
        for split, path in self._speakers():
            # Where none is given all archives were looked into already.
            given = split if split or self.made else self._inner_split(path)
            if self._split(given, path) == "train":
                speakers.add(_speaker(path))
        spoken = self._transcripts()
        texts = (said.text for name, said in spoken.items() if name[6:11] in speakers)
        self.set_labels((), sorted({c for text in texts for c in text or ""}))

    def num_source_files(self) -> int:
        """Folders and archives of speakers."""
        return len(self._speakers()) or 1

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Utterances by speakers: those of folders, then those of archives, each in order."""
        spoken = self._transcripts()
        heard: set[str] = set()
        for name, said in spoken.items():
            if said.text is None:
                key = make_key("transcript", name)
                yield error_row(key, said.problem, self.transcript, said.line, said.truncates_file)
        unpacked = set()
        for split, path in self._speakers():
            if not path.endswith(ARCHIVES):
                unpacked.add(_speaker(path))
            for name, inside, reference in self._recordings(path):
                key, line = make_key(inside), spoken.get(name)
                home = self._split(split or _split_in(inside.split("/")), path)
                if isinstance(reference, str):
                    if _speaker(path) not in unpacked:
                        yield error_row(key, reference, inside, truncates_file=True)
                    continue
                if name in heard:
                    continue
                heard.add(name)
                if home is None:
                    yield error_row(key, "neither train, dev nor test in its path", inside)
                elif line is None or line.text is None:
                    # Known of the corpus: 360 recordings have none.
                    yield RejectedRow(key, "a recording without a transcript", inside)
                else:
                    row = media_row(home, key, reference, text=line.text)
                    yield row | {"file": self.transcript, "row": line.line}
        for name, said in spoken.items():
            if said.text is not None and name not in heard:
                key = make_key("transcript", name)
                yield error_row(key, "a transcript without a recording", self.transcript, said.line)

    def _split(self, given: str | None, path: str) -> str | None:
        """The split of a speaker: as given, or made of its name alone."""
        if given is None and self.made:
            return hash_split(_speaker(path), _SHARES)
        return given

    def _inner_split(self, path: str) -> str | None:
        """The split that the first member of a speaker's archive names."""
        if path.endswith(ARCHIVES):
            # Of an archive that cannot be read, ``rows`` tells.
            with contextlib.suppress(TarReadError, *PER_FILE_ERRORS):
                return _split_in(next(_members(self.media_source, path), "").split("/"))
        return None

    def _transcripts(self) -> "dict[str, TranscriptLine]":
        """Utterance -> what is said. Some 30 MB for all."""
        found: dict[str, TranscriptLine] = {}
        number = 0
        try:
            for number, line in self.source.lines(self.transcript):
                # Some copies have a tab behind the name.
                name, words, *_ = [*line.decode("utf-8", "replace").split(maxsplit=1), "", ""]
                try:
                    found[name] = TranscriptLine(number, normalize_transcript(clean_text(words)))
                except ValueError:
                    found[name] = TranscriptLine(number, None, "an empty or damaged transcript")
        except DAMAGE_ERRORS:
            why = "the compressed file is cut short or damaged"
            found[f"line {number + 1}"] = TranscriptLine(number + 1, None, why, truncates_file=True)
        return found

    def _speakers(self) -> list[tuple[str | None, str]]:
        """(Split, path) of every folder, then of every archive, of a speaker; the split is none
        where at most the members of the archive tell it."""
        found: list[tuple[str | None, str]] = []
        for entry in self.media_source.entries(self.wav):
            path = f"{self.wav}/{entry.name}" if self.wav else entry.name
            if entry.is_folder and (split := parse_split_name(entry.name)):
                for below in self.media_source.entries(path):
                    if below.is_folder or below.name.endswith(ARCHIVES):
                        found.append((split, f"{path}/{below.name}"))
            elif entry.name.endswith(ARCHIVES) or (entry.is_folder and entry.name != "__MACOSX"):
                found.append((None, path))
        return sorted(found, key=lambda speaker: speaker[1].endswith(ARCHIVES))

    def _recordings(self, path: str) -> Iterator[tuple[str, str, MediaRef | str]]:
        """(Utterance, where it is, reference); a reason where the archive cannot be read on."""
        if not path.endswith(ARCHIVES):
            for entry in self.media_source.walk(path):
                if entry.name.lower().endswith(".wav"):
                    yield (
                        _utterance(entry.name),
                        entry.name,
                        MediaRef(self.media_source.path(entry.name)),
                    )
            return
        where = self.media_source.path(path)
        try:
            for member in _members(self.media_source, path):
                if member.lower().endswith(".wav"):
                    yield _utterance(member), f"{path}/{member}", MediaRef(where, member=member)
        except TarReadError:
            yield "", path, "the speaker's archive is cut short or damaged"
        except PER_FILE_ERRORS:
            yield "", path, "the speaker's archive cannot be opened"


@dataclass(frozen=True)
class TranscriptLine:
    """A line of the transcript.

    Args:
        line: its number, from 1.
        text: what is said, or none if the line is of no use.
        problem: why it is of none.
        rest: the file cannot be read on behind it.
    """

    line: int
    text: str | None
    problem: str = ""
    truncates_file: bool = False


def _utterance(path: str) -> str:
    """``"train/S0002/BAC009S0002W0122.wav" -> "BAC009S0002W0122"``."""
    return path.rpartition("/")[2][:-4]


def _speaker(path: str) -> str:
    """``"wav/train/S0002.tar.gz" -> "S0002"``."""
    return path.rpartition("/")[2].split(".")[0]


def _transcript(place: SourceDirectory) -> str | None:
    if place.is_file:
        return None
    for folder in (f"{above}transcript" for above in ("", _ROOT, _ROOT * 2)):
        if place.exists(folder):
            for entry in place.entries(folder):
                if _TRANSCRIPT.match(entry.name):
                    return f"{folder}/{entry.name}"
    return None


def _whole_corpus(place: SourceDirectory) -> str | None:
    """The folder that ``data_aishell/wav``, or what is in it, is a part of."""
    if place.is_file:
        return None
    uri = place.uri
    for _ in range(2):
        above, _, name = uri.rpartition("/")
        if name in ("wav", "transcript") or parse_split_name(name):
            uri = above
    return uri if uri != place.uri and _transcript(SourceDirectory(uri)) else None


def _members(place: SourceDirectory, path: str) -> Iterator[str]:
    """Names of the files of a compressed tar, front to back."""
    where = place.path(path)
    with open_stream(where) as stream, contextlib.closing(TarReader(where, stream)) as tar:
        for entry in tar:
            if not entry.name.rpartition("/")[2].startswith("."):  # macOS leaves ``._`` files
                yield entry.name


def _split_in(parts: list[str]) -> str | None:
    return next((split for part in parts if (split := parse_split_name(part))), None)
