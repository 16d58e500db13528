"""AISHELL-1: Mandarin read aloud by 400 speakers, 16 kHz mono, with transcripts.

    data_aishell/transcript/aishell_transcript_v0.8.txt     <utterance> <words by spaces>
    data_aishell/wav/{train,dev,test}/S0002/BAC009S0002W0122.wav
    data_aishell/wav/{train,dev,test}/S0002.tar.gz           a speaker not yet unpacked
    data_aishell/wav/S0002.tar.gz                            holding train/S0002/….wav

Speakers that are still archives are read in place. Words are joined: error rates are of characters.
The inventory of symbols is that of the training speakers' transcripts, with ``<unk>`` for
characters that only other speakers say.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.finish import SoundOptions
from pipelines.corpora.placed import (
    MediaOptions,
    PlacedCorpus,
    bad,
    characters_of,
    clean_text,
    key_of,
    media_row,
)
from pipelines.media import MediaRef
from pipelines.places import Place
from pipelines.source_files import OWN, open_stream
from pipelines.tars import BadTar, Tar
from skillnet_platform.errors import UserError

PARTS = {"train": "train", "dev": "validation", "test": "test"}
ARCHIVES = (".tar.gz", ".tgz")
_TRANSCRIPT = re.compile(r"aishell_transcript.*\.txt(\.gz)?$")


@dataclass
class AishellOptions(MediaOptions, SoundOptions):
    """AISHELL-1: the options of recordings."""


class Aishell1(PlacedCorpus):
    """Utterances, each with its transcript."""

    name = "aishell1"
    modality = "sound"
    Options = AishellOptions
    has = ("transcripts",)

    @classmethod
    def guess(cls, place: Place) -> str | None:
        """Its transcript file."""
        found = _transcript(place)
        return f"{found} is the transcript of AISHELL-1" if found else None

    def locate(self) -> None:
        """Find transcript and recordings."""
        found = _transcript(self.place)
        if found is None:
            raise UserError(
                f"{self.place.uri}: no transcript/aishell_transcript_v0.8.txt in it; AISHELL-1 is "
                "a folder data_aishell with transcript and wav"
            )
        self.transcript = found
        root = found.rpartition("transcript/")[0]
        self.home = Place(self.options.media) if self.options.media else self.place
        self.wav = "" if self.options.media else f"{root}wav"
        if not self.home.exists(self.wav):
            raise UserError(f"{self.home.uri}/{self.wav}: no such folder; recordings are there")

    def annotations(self) -> list[str]:
        """The transcript file."""
        return [self.transcript]

    def survey(self) -> None:
        """The characters that training speakers say, without listing their recordings."""
        speakers = set()
        for split, path in self._speakers():
            if split is None:
                member = next(_members(self.home, path), "")
                split = _split_in(member.split("/"))
            if split == "train":
                speakers.add(path.rpartition("/")[2].split(".")[0])
        spoken = self._transcripts()
        texts = (text for name, text in spoken.items() if text and name[6:11] in speakers)
        self.keep((), sorted({c for text in texts for c in text}))

    def rows(self, sources: Sources) -> Iterator[Row | Rejected]:
        """Utterances by speakers, in the order of folders and archives."""
        spoken = self._transcripts()
        heard: set[str] = set()
        for name, text in spoken.items():
            if text is None:
                heard.add(name)
                yield bad(
                    key_of("transcript", name), "an empty or damaged transcript", self.transcript
                )
        for split, path in self._speakers():
            for name, inside, reference in self._recordings(path):
                key = key_of(inside)
                home = split or _split_in(inside.split("/"))
                if reference is None:
                    yield bad(key, "the speaker's archive is cut short or damaged", inside)
                elif home is None:
                    yield bad(key, "neither train, dev nor test in its path", inside)
                elif spoken.get(name) is None:
                    # Known of the corpus: 360 recordings have none.
                    yield Rejected(key, "a recording without a transcript", inside)
                else:
                    yield media_row(home, key, reference, text=spoken[name])
                heard.add(name)
        for name in spoken:
            if name not in heard:
                yield bad(key_of("transcript", name), "a transcript without a recording")

    def _transcripts(self) -> dict[str, str | None]:
        """Utterance -> what is said; none where the line is of no use. Some 8 MB for all."""
        found: dict[str, str | None] = {}
        for _, line in self.place.lines(self.transcript):
            name, _, words = line.decode("utf-8", "replace").strip().partition(" ")
            try:
                found[name] = characters_of(clean_text(words))
            except ValueError:
                found[name] = None
        return found

    def _speakers(self) -> Iterator[tuple[str | None, str]]:
        """(Split, path) of every folder or archive of a speaker; the split is none where only the
        members of the archive tell it."""
        for entry in self.home.entries(self.wav):
            path = f"{self.wav}/{entry.name}" if self.wav else entry.name
            if entry.is_folder and entry.name in PARTS:
                for below in self.home.entries(path):
                    if below.is_folder or below.name.endswith(ARCHIVES):
                        yield PARTS[entry.name], f"{path}/{below.name}"
            elif entry.name.endswith(ARCHIVES):
                yield None, path

    def _recordings(self, path: str) -> Iterator[tuple[str, str, MediaRef | None]]:
        """(Utterance, where it is, reference); no reference where the archive breaks off."""
        if not path.endswith(ARCHIVES):
            for entry in self.home.walk(path):
                if entry.name.endswith(".wav"):
                    name = entry.name.rpartition("/")[2].removesuffix(".wav")
                    yield name, entry.name, MediaRef(self.home.path(entry.name))
            return
        where = self.home.path(path)
        try:
            for member in _members(self.home, path):
                if member.endswith(".wav"):
                    name = member.rpartition("/")[2].removesuffix(".wav")
                    yield name, f"{path}/{member}", MediaRef(where, member=member)
        except (BadTar, *OWN):
            yield "", path, None


def _transcript(place: Place) -> str | None:
    if place.is_file:
        return None
    for folder in ("transcript", "data_aishell/transcript"):
        if place.exists(folder):
            for entry in place.entries(folder):
                if _TRANSCRIPT.match(entry.name):
                    return f"{folder}/{entry.name}"
    return None


def _members(place: Place, path: str) -> Iterator[str]:
    """Names of the files of a compressed tar, front to back."""
    where = place.path(path)
    with open_stream(where) as stream, contextlib.closing(Tar(where, stream)) as tar:
        for entry in tar:
            yield entry.name


def _split_in(parts: list[str]) -> str | None:
    return next((PARTS[part] for part in parts if part in PARTS), None)
