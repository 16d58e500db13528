"""Corpus ``drawings_artists``: the task of ``drawings``, with a third artist as the reserve.

All rows of ``drawings`` keep their splits. No drawing of Emoji One is in training, so the reserve
asks for known concepts by an unseen artist. Drawings of concepts that training never contains are
in a reserve of their own. Icons are found by the English names of their concepts.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from pipelines.data.corpora.base import Archive, RejectedRow, Row, SourceArchives
from skillnet_corpora.archives import read_archive
from skillnet_corpora.demo.drawings import DrawingsCorpus, code_of_characters, is_flag
from skillnet_corpora.study.further_splits import RESERVE

ARTIST = "emojione"
RESERVED_UNSEEN = f"{RESERVE}_unseen_concept"

EMOJIONE = Archive(
    "iconify-json-emojione-v1-1.2.3.tgz",
    3_704_153,
    "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3",
    "npm",
    "@iconify-json/emojione-v1@1.2.3",
    "drawings CC BY-SA 4.0 (Emoji One)",
)


class DrawingArtistsCorpus(DrawingsCorpus):
    """Emoji drawings of two artists for training and testing, and of a third as reserve."""

    name = "drawings_artists"
    version = 1
    archives = (*DrawingsCorpus.archives, EMOJIONE)

    def rows(self, sources: SourceArchives) -> Iterator[Row | RejectedRow]:
        """Yield the rows of ``drawings``, then the icons in the order of their names."""
        concepts: dict[str, Row] = {}
        for row in super().rows(sources):
            yield row
            if not isinstance(row, RejectedRow) and row["split"] != "pretrain":
                concepts[row["key"].partition("/")[2]] = row
        icons = json.loads(read_archive(sources, "iconify", "package/icons.json"))
        codes = _find_codes(sources, icons, concepts)
        box = f"0 0 {icons['width']} {icons['height']}"
        for name in sorted(icons["icons"]):
            key = f"{ARTIST}/{name}"
            concept = concepts.get(codes.get(name, ""))
            if concept is None:
                yield RejectedRow(key, "no concept of this name")
                continue
            body = icons["icons"][name]["body"]
            svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
            is_unseen = concept["split"] == "test_unseen_concept"
            yield concept | {
                "split": RESERVED_UNSEEN if is_unseen else RESERVE,
                "key": key,
                "unit": ARTIST,
                "image": svg.encode(),
                "source": ARTIST,
            }

    def preprocessing(self) -> dict[str, Any]:
        """Return the numbers of ``drawings`` and its version."""
        return super().preprocessing() | {"drawings_version": DrawingsCorpus.version}


def _find_codes(
    sources: SourceArchives, icons: dict[str, Any], concepts: dict[str, Row]
) -> dict[str, str]:
    """Return name of an icon -> code of its concept; each concept has at most one icon."""
    listed = json.loads(read_archive(sources, "cldr", "package/annotations/en/annotations.json"))
    found: dict[str, str] = {}
    for characters, entry in listed["annotations"]["annotations"].items():
        code = code_of_characters(characters)
        # Flags have the same design in all sets.
        if code not in concepts or is_flag(code) or "tts" not in entry:
            continue
        name = re.sub(r"[^a-z0-9]+", "-", entry["tts"][0].lower()).strip("-")
        # Icons keep the names of older Unicode versions; newer names are aliases of them.
        alias = icons["aliases"].get(name, {}).get("parent", "")
        icon = name if name in icons["icons"] else alias
        if icon in icons["icons"]:
            found.setdefault(icon, code)
    return found
