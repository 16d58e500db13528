"""Layouts of published corpora: lists of splits are used, and folders that are no classes asked."""

import unicodedata
from pathlib import Path

import pytest

from pipelines.data.corpora import open_external_corpus
from pipelines.data.preprocessing import inspection
from skillnet_platform.errors import UserError
from tests.unit.pipelines.data.corpora.readers.test_readers import read, sizes

#: Layouts whose lists and classes are read: file -> text, None for a medium.
LISTED: dict[str, dict[str, str | None]] = {
    "speech commands": {
        **{f"{word}/{n}_nohash_0.wav": None for word in ("yes", "no") for n in range(6)},
        "_background_noise_/pink.wav": None,
        "testing_list.txt": "yes/0_nohash_0.wav\nno/0_nohash_0.wav\n",
        "validation_list.txt": "yes/1_nohash_0.wav\nno/1_nohash_0.wav\n",
        "README.md": "words",
    },
    "food": {
        **{f"images/{dish}/10{n}.jpg": None for dish in ("pie", "soup") for n in range(6)},
        "meta/train.txt": "".join(f"{d}/10{n}\n" for d in ("pie", "soup") for n in range(2, 6)),
        "meta/test.txt": "".join(f"{d}/10{n}\n" for d in ("pie", "soup") for n in range(2)),
        "meta/classes.txt": "pie\nsoup\n",
        "meta/test.json": '{"pie": ["pie/100", "pie/101"], "soup": ["soup/100", "soup/101"]}',
    },
    "actions": {
        **{
            f"UCF-101/{act}/v_{act}_g0{n}_c01.avi": None
            for act in ("Dive", "Swim")
            for n in range(6)
        },
        "ucfTrainTestlist/classInd.txt": "1 Dive\n2 Swim\n",
        "ucfTrainTestlist/trainlist01.txt": "".join(
            f"{act}/v_{act}_g0{n}_c01.avi {i}\n"
            for i, act in enumerate(("Dive", "Swim"), 1)
            for n in range(2, 6)
        ),
        "ucfTrainTestlist/testlist01.txt": "".join(
            f"{act}/v_{act}_g0{n}_c01.avi\n" for act in ("Dive", "Swim") for n in range(2)
        ),
        "ucfTrainTestlist/testlist02.txt": "Dive/v_Dive_g05_c01.avi\n",
    },
    "birds": {
        **{f"images/00{c}.Auk{c}/Auk_{c}_{n}.jpg": None for c in (1, 2) for n in range(6)},
        "images.txt": "".join(
            f"{6 * c + n - 5} 00{c}.Auk{c}/Auk_{c}_{n}.jpg\n" for c in (1, 2) for n in range(6)
        ),
        "train_test_split.txt": "".join(
            f"{6 * c + n - 5} {int(n > 1)}\n" for c in (1, 2) for n in range(6)
        ),
        "image_class_labels.txt": "1 1\n2 1\n",
        "classes.txt": "1 001.Auk1\n2 002.Auk2\n",
    },
    "motions": {
        **{f"{act}/my clip {act} {n}.avi": None for act in ("run", "jump") for n in range(6)},
        **{
            f"splits/{act}_test_split{division}.txt": "".join(
                f"my clip {act} {n}.avi {1 + ((n + division) % 6 < 3)}\n" for n in range(5)
            )
            for act in ("run", "jump")
            for division in (1, 2)
        },
    },
}
#: Layouts whose folders may be no classes, with the file or word that shows it.
UNCLEAR: dict[str, tuple[dict[str, str | None], str]] = {
    "voc": (
        {
            **{f"JPEGImages/2007_{n}.jpg": None for n in range(4)},
            **{f"SegmentationClass/2007_{n}.png": None for n in range(4)},
            **{f"Annotations/2007_{n}.xml": "<annotation/>" for n in range(4)},
            "ImageSets/Main/train.txt": "2007_0\n2007_1\n",
        },
        "JPEGImages, SegmentationClass say how files are stored",
    ),
    "boxes": (
        {
            **{f"{each}/2007_{n}.jpg": None for each in ("indoor", "street") for n in range(4)},
            **{f"Annotations/2007_{n}.xml": "<annotation/>" for n in range(4)},
        },
        "2007_0.xml: describes indoor/2007_0.jpg",
    ),
    "vctk": (
        {
            **{f"wav48/p{s}/p{s}_00{n}.wav": None for s in (225, 226) for n in range(4)},
            **{f"txt/p{s}/p{s}_00{n}.txt": "Hello." for s in (225, 226) for n in range(4)},
            "speaker-info.txt": "ID AGE\n225 23\n",
        },
        "p225_000.txt: describes wav48/p225/p225_000.wav",
    ),
    "aishell3": (
        {
            **{f"{e}/wav/S{s}/S{s}00{n}.wav": None for e in ("train", "test") for s in (1, 2)
               for n in range(4)},
            "train/content.txt": "".join(f"S{s}00{n}.wav\t广 guang3\n" for s in (1, 2)
                                         for n in range(4)),
        },
        "content.txt: describes",
    ),
    "librispeech": (
        {
            **{f"{s}/7/{s}-7-000{n}.flac": None for s in (84, 85) for n in range(4)},
            **{f"{s}/7/{s}-7.trans.txt": f"{s}-7-0000 GO\n{s}-7-0001 DO\n" for s in (84, 85)},
            **{f"{s}/8/{s}-8-000{n}.flac": None for s in (84, 85) for n in range(4)},
        },
        "trans.txt: describes",
    ),
    "urban sounds": (
        {
            **{f"audio/fold{f}/10{f}-{n}.wav": None for f in (1, 2) for n in range(4)},
            "metadata/Urban.csv": "slice_file_name,fold,class\n101-0.wav,1,siren\n",
        },
        "fold1, fold2 say how files are stored",
    ),
    "one folder with a table": (
        {
            **{f"audio/1-{n}-A.wav": None for n in range(4)},
            "meta/esc50.csv": "filename,fold,category\n1-0-A.wav,1,dog\n1-1-A.wav,2,cat\n",
        },
        "esc50.csv: describes audio/1-0-A.wav, but no folder is a class",
    ),
    "clotho": (
        {
            **{f"{e}/A noise {n}.wav": None for e in ("development", "evaluation")
               for n in range(4)},
            "clotho_captions_development.csv": 'file_name,caption_1\nA noise 0.wav,"a, hum"\n',
        },
        "clotho_captions_development.csv: describes",
    ),
    "pets": (
        {
            **{f"images/Abyssinian_{n}.jpg": None for n in range(4)},
            **{f"annotations/trimaps/Abyssinian_{n}.png": None for n in range(4)},
            "annotations/trainval.txt": "Abyssinian_0 1 1 1\nAbyssinian_1 1 1 1\n",
            "annotations/list.txt": "#Image CLASS-ID\nAbyssinian_0 1 1 1\nAbyssinian_1 1 1 1\n",
        },
        "images, trimaps say how files are stored",
    ),
    "a list in a closed format": (
        {
            **{f"Images/{dog}/{dog}_{n}.jpg": None for dog in ("n1-Pug", "n2-Chow")
               for n in range(4)},
            "train_list.mat": "MATLAB", "test_list.mat": "MATLAB",
        },
        "test_list.mat: this list of a split is not read",
    ),
}  # fmt: skip


def write(home: Path, files: dict[str, str | None]) -> Path:
    for name, text in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("not looked at" if text is None else text, encoding="utf-8")
    return home


@pytest.mark.parametrize("layout", LISTED)
def test_lists_of_published_corpora_name_the_splits(tmp_path: Path, layout: str) -> None:
    corpus = open_external_corpus("mine", f"folder:{write(tmp_path, LISTED[layout])}")
    rows, reasons = read(corpus)
    labels = {row["label"] for each in rows.values() for row in each}
    assert len(labels) == 2
    if layout == "motions":
        assert sizes(rows)["test"] == 4
        assert reasons == {"a media file that no list of splits names": 2}
    else:
        assert sizes(rows)["test"] == (2 if layout == "speech commands" else 4)
    if layout == "speech commands":
        assert reasons == {"in a folder whose name begins with _, which is no class": 1}
        assert sizes(rows) == {"train": 8, "validation": 2, "test": 2}
    tested = {row["media"]["path"].rpartition("/")[2] for row in rows["test"]}
    assert layout != "birds" or tested == {f"Auk_{c}_{n}.jpg" for c in (1, 2) for n in (0, 1)}


@pytest.mark.parametrize("layout", UNCLEAR)
def test_folders_that_may_be_no_classes_are_asked_for(tmp_path: Path, layout: str) -> None:
    files, sign = UNCLEAR[layout]
    write(tmp_path, files)
    with pytest.raises(UserError) as error:
        open_external_corpus("mine", f"folder:{tmp_path}")
    assert sign in str(error.value)
    # The remedy that the message gives.
    assert "--options.mine.task labels" in str(error.value)
    if layout not in ("one folder with a table", "clotho"):
        corpus = open_external_corpus("mine", f"folder:{tmp_path}", {"task": "labels"})
        assert sum(map(len, read(corpus)[0].values())) > 0


@pytest.mark.parametrize(
    "files",
    [
        {"classes.txt": "1 cat\n2 dog\n"},
        {"labels.csv": "file,label\ncat/1.jpg,cat\ndog/1.jpg,dog\n"},
        {"notes.txt": "Photographs of cats and dogs, taken by me.", "train.txt": "loss 0.3\n"},
        {"sizes.csv": "1,640\n2,480\n"},
    ],
)
def test_files_that_do_not_contradict_the_folders_are_no_question(
    tmp_path: Path, files: dict[str, str | None]
) -> None:
    media: dict[str, str | None] = {f"{c}/{n}.jpg": None for c in ("cat", "dog") for n in range(4)}
    corpus = open_external_corpus("mine", f"folder:{write(tmp_path, media | files)}")
    rows, _ = read(corpus)
    assert {row["label"] for each in rows.values() for row in each} == {"cat", "dog"}
    assert not corpus.named_splits  # type: ignore[attr-defined]


def test_lists_match_in_any_unicode_form(tmp_path: Path) -> None:
    names = [f"{c}/é{n}.jpg" for c in ("cat", "dog") for n in range(4)]
    media = {unicodedata.normalize("NFD", name): None for name in names}
    lists = {"test.txt": unicodedata.normalize("NFC", "\n".join(names[:2]))}
    corpus = open_external_corpus("mine", f"folder:{write(tmp_path, media | lists)}")
    assert sizes(read(corpus)[0])["test"] == 2


def test_lists_that_disagree_are_refused(tmp_path: Path) -> None:
    lists: dict[str, str | None] = {"train.txt": "cat/0.jpg\n", "test.txt": "cat/0.jpg\n"}
    media: dict[str, str | None] = {f"{c}/{n}.jpg": None for c in ("cat", "dog") for n in range(4)}
    write(tmp_path, media | lists)
    with pytest.raises(UserError, match=r"names cat/0\.jpg for .*Remove it from one of the lists"):
        open_external_corpus("mine", f"folder:{tmp_path}")


def test_development_is_for_training_if_nothing_else_is(tmp_path: Path) -> None:
    names = [
        f"{e}/{c}/{n}.wav" for e in ("development", "evaluation") for c in "ab" for n in (1, 2)
    ]
    corpus = open_external_corpus("mine", f"folder:{write(tmp_path, dict.fromkeys(names))}")
    rows, _ = read(corpus)
    assert sizes(rows)["test"] == 4
    assert "train" in rows


def test_lists_are_shown_and_hashed(tmp_path: Path) -> None:
    write(tmp_path, LISTED["food"])
    report = inspection.inspect_corpus(str(tmp_path))
    assert report["named_splits"] == ["test", "train"]
    assert "meta/train.txt" not in report["unread"]
    before = open_external_corpus("mine", f"folder:{tmp_path}").extra_sources()
    (tmp_path / "meta/test.txt").write_text("pie/100\n", encoding="utf-8")
    assert open_external_corpus("mine", f"folder:{tmp_path}").extra_sources() != before
