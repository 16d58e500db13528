"""The choice of a format by detection or by name, and messages for wrong arguments."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from pipelines.data.corpora import (
    _find_class,
    detect_reader,
    find_corpus,
    list_formats,
    open_external_corpus,
)
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.io.directory import SourceDirectory
from skillnet_platform.errors import UserError
from tests.helpers import user_corpora

BUILDERS = {
    "tnews": user_corpora.tnews,
    "aishell1": user_corpora.aishell1,
    "aic_icc": user_corpora.aic_icc,
    "vatex": user_corpora.vatex,
    "pytorrent": user_corpora.pytorrent,
    "codesearchnet": user_corpora.codesearchnet,
    "webdataset": user_corpora.webdataset,
    "folder": user_corpora.media_folder,
}


@pytest.mark.parametrize("name", BUILDERS)
def test_the_format_is_detected(tmp_path: Path, name: str) -> None:
    found = detect_reader(SourceDirectory(str(BUILDERS[name](tmp_path / "here"))))
    assert found[0] == name


@pytest.mark.parametrize("name", BUILDERS)
def test_reading_twice_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    folder = str(BUILDERS[name](tmp_path / "here"))
    first, second = (open_external_corpus(name, folder) for _ in range(2))
    assert list(first.rows(SourceArchives.none())) == list(second.rows(SourceArchives.none()))
    assert first.extra_sources() == second.extra_sources()


def test_an_unknown_format_is_not_detected(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert detect_reader(SourceDirectory(str(tmp_path))) is None


@pytest.mark.parametrize(
    ("name", "place", "options", "message"),
    [
        ("tnews", "{empty}", {}, "no train.json in it"),
        ("tnews", "{empty}/none", {}, "no such file or folder"),
        ("aishell1", "{empty}", {}, "no transcript"),
        ("aic_icc", "{empty}", {}, "no caption_train_annotations"),
        ("vatex", "{empty}", {}, "no vatex_training"),
        ("pytorrent", "{empty}", {}, "no folder train"),
        ("webdataset", "{empty}", {}, r"no \.tar in it"),
        ("hf_dataset", "{empty}", {}, "neither dataset_dict.json nor state.json"),
        ("folder", "{empty}", {}, "neither a metadata file"),
        ("tnesw", "{empty}", {}, "did you mean 'tnews'"),
        ("mine", "tnesw:{empty}", {}, "did you mean 'tnews'"),
        ("mine", "headings:{empty}", {}, "not read by path"),
        ("headings", "{empty}", {}, "built-in"),
        ("a/b", "tnews:{empty}", {}, "letters, digits"),
        ("tnews", "{tnews}", {"keyword": True}, "did you mean 'keywords'"),
        ("tnews", "{tnews}", {"max_tokens": "x"}, "max_tokens: expected a whole number"),
        ("tnews", "{tnews}", {"validation": 2}, "validation: .* at least 0 and below 1"),
        ("tnews", "{tnews}", {"max_tokens": -3}, "options.tnews: max_tokens: .* from 1"),
        ("folder", "{tnews}", {"size": 0}, "options.folder: size: .* from 1 to 4096, got 0"),
        ("folder", "{tnews}", {"frames": 0}, "frames: .* from 1 to 4096, got 0"),
        ("folder", "{tnews}", {"video_size": 10**7}, "video_size: .* to 4096, got 10000000"),
        ("folder", "{tnews}", {"video_channels": 2}, "video_channels: expected one of 1, 3, got 2"),
        ("folder", "{tnews}", {"max_seconds": 0}, "max_seconds: .* from 0.1 to 3600, got 0"),
        ("folder", "{tnews}", {"max_seconds": float("nan")}, "max_seconds"),
        ("folder", "{tnews}", {"max_megabytes": 0}, "max_megabytes: .* from 1 to 1048576, got 0"),
        ("codesearchnet", "{tnews}", {"shortest": -1}, "shortest: .* from 0 to"),
        ("codesearchnet", "{tnews}", {"max_code_tokens": 0}, "max_code_tokens: .* got 0"),
    ],
)
def test_a_user_error_has_one_message(tmp_path, name, place, options, message):
    (tmp_path / "empty").mkdir()
    user_corpora.tnews(tmp_path / "tnews")
    where = place.format(empty=tmp_path / "empty", tnews=tmp_path / "tnews")
    with pytest.raises(UserError, match=message):
        open_external_corpus(name, where, options)


def test_a_format_needs_a_path() -> None:
    with pytest.raises(UserError, match="give --corpus tnews=PATH"):
        find_corpus("tnews")


def test_every_option_is_documented() -> None:
    """The guide names it, and the docstring of its dataclass explains it."""
    guide = (Path(__file__).parents[6] / "docs" / "own-corpora.md").read_text(encoding="utf-8")
    missing = []
    for name in list_formats():
        kind = _find_class(name).Options
        explained = "".join(base.__doc__ or "" for base in kind.__mro__)
        missing += [
            f"{name}.{option.name}"
            for option in fields(kind)
            # Python 3.13 removes the indentation of docstrings.
            if f"`{option.name}`" not in guide
            or not re.search(rf"^ +{option.name}: ", explained, re.MULTILINE)
        ]
    assert missing == []
