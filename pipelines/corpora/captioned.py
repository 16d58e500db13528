"""What AIC-ICC and VATEX share: files of annotations, and media with captions that are alike."""

from pipelines.corpora.placed import PlacedCorpus
from pipelines.places import Place


class CaptionedCorpus(PlacedCorpus):
    """Media, each with all of its captions, told by annotations that name splits."""

    has = ("captions",)
    alike = True
    files: list[tuple[str, str]]
    home: Place

    def take(self, files: list[tuple[str, str]]) -> None:
        """Read these annotations, (split, file) each, and the media beside them or elsewhere."""
        self.files = files
        self.home = Place(self.options.media) if self.options.media else self.place

    @property
    def halved(self) -> bool:
        """Whether the validation rows are parted in halves, for there is no test."""
        return not any(split.startswith("test") for split, _ in self.files)

    def annotations(self) -> list[str]:
        """The files of annotations."""
        return [file for _, file in self.files]
