"""Packages of skills: they change no old output, and go without a trace."""

import cProfile
import hashlib
import io
import json
import math
import pstats
import random
import shutil
import weakref
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from skillnet import SkillNet
from skillnet.model_merging import add_skill, add_task
from skillnet.package_joins import add_packages, list_packages, remove_packages
from skillnet.serialization import check_file, read_manifest, read_tensor_shapes
from skillnet.skill_packages import (
    ABOUT,
    PROBES,
    PackedForm,
    SkillPackage,
    open_package,
    pack_skills,
    read_package_header,
)
from skillnet.skill_proofs import PROBE_ROWS, TaskProof, probe_outputs
from skillnet.skills import SkillPlan, Task
from skillnet.vocabulary import ModelVocabulary
from tests.helpers.small_models import small_model

OUTPUTS, RANK = 3, 2


def grow(base: Path, number: int, folder: Path, modality: str = "text", rank: int = 0) -> Path:
    """Save a model that grew by a skill and a task from a base; with a rank, from ``text``."""
    model = SkillNet.from_pretrained(base)
    skill, task = f"extra{number}", f"task{number}"
    torch.manual_seed(100 + number)
    add_skill(model, skill, "text" if rank else None, rank)
    plan = SkillPlan(tuple(sorted(("general", skill))), modality)
    add_task(model, task, Task("classification", {"input": plan}, outputs=OUTPUTS))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if model.file_of(name) in (f"skill-{skill}", f"head-{task}"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    names = tuple(f"class {index} of {number}" for index in range(OUTPUTS))
    found = model.vocabulary
    model.vocabulary = ModelVocabulary(
        found.tokenizer, {**found.outputs, task: names}, dict(found.scales)
    )
    model.save_pretrained(folder)
    return folder


def pack(grown: Path, number: int, target: Path) -> Path:
    pack_skills(grown, [f"task{number}"], target, program="0.1.0")
    return target


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and packages that were made from it in working folders of their own."""
    folder = tmp_path_factory.mktemp("shelf")
    small_model(torch.float32).save_pretrained(folder / "base")
    for number, (modality, rank) in enumerate((("text", 0), ("video", 0), ("text", RANK))):
        grown = grow(folder / "base", number, folder / f"grown{number}", modality, rank)
        pack(grown, number, folder / f"p{number}.skill")
    return folder


@pytest.fixture
def base(shelf: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shelf / "base", tmp_path / "model"))


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def add(folder: Path, *paths: Path) -> list[TaskProof]:
    opened: list[SkillPackage] = []
    with ExitStack() as stack:
        for number, path in enumerate(paths):
            scratch = folder.parent / f"opened{number}"
            opened.append(stack.enter_context(open_package(path, scratch)))
        return add_packages(folder, opened)


def test_what_is_added_proves_itself_and_goes_without_a_trace(shelf: Path, base: Path) -> None:
    before = hashes(base)
    proofs = add(base, shelf / "p0.skill", shelf / "p1.skill")
    old = [proof for proof in proofs if proof.package is None]
    assert {proof.task for proof in old} == set(
        SkillNet.from_pretrained(shelf / "base").config.tasks
    )
    assert {(proof.rows, proof.differing) for proof in old} == {(PROBE_ROWS, 0)}
    after = SkillNet.from_pretrained(base)
    assert all(proof.parameters == after.activated_parameters(proof.task) for proof in proofs)
    new = {proof.task: proof for proof in proofs if proof.package}
    assert {task: (p.package, p.differing) for task, p in new.items()} == {
        "task0": ("p0", 0),
        "task1": ("p1", 0),
    }
    joined = SkillNet.from_pretrained(base)
    grown = SkillNet.from_pretrained(shelf / "grown1")
    assert joined.vocabulary.outputs["task1"] == grown.vocabulary.outputs["task1"]
    for name, parameter in grown.named_parameters():
        assert torch.equal(joined.get_parameter(name), parameter), name
    assert SkillNet.from_pretrained(base, "task1").config.skills == ("general", "extra1")
    assert list(list_packages(base)) == ["p0", "p1"]
    manifest = read_manifest(base)
    for name in manifest["files"]:
        check_file(base, name, manifest)
    for name in ("p0", "p1"):
        remove_packages(base, [name])
    assert hashes(base) == before


def test_a_low_rank_package_has_the_size_of_its_factors(shelf: Path, base: Path) -> None:
    with open_package(shelf / "p2.skill", base.parent / "opened") as package:
        content = package.content
        shapes = read_tensor_shapes(package.find_file("skill-extra2.safetensors"))
    assert content.low_rank == {"extra2": PackedForm("text", RANK)}
    assert "skill-text.safetensors" in content.base
    config = SkillNet.from_pretrained(base).config
    width = 8 * config.dim + 2 * config.ffn_dim  # D x 3D, D x D, and D x F twice
    assert sum(map(math.prod, shapes.values())) == config.num_layers * RANK * width
    whole = config.num_layers * (4 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    saved = (shelf / "p0.skill").stat().st_size - (shelf / "p2.skill").stat().st_size
    # Beside the weights, headers of two tensors for one, and the form.
    assert saved == pytest.approx(4 * (whole - config.num_layers * RANK * width), abs=2500)
    add(base, shelf / "p2.skill")
    joined, grown = (SkillNet.from_pretrained(x, "task2") for x in (base, shelf / "grown2"))
    assert joined.config == grown.config
    found, expected = (probe_outputs(each, ["task2"])["task2"] for each in (joined, grown))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_package_stays_while_another_one_needs_its_skill(shelf: Path, base: Path) -> None:
    """The second skill is a difference to the first one, which is a difference to the base's."""
    before = hashes(base)
    add(base, shelf / "p2.skill")
    model = SkillNet.from_pretrained(base)
    add_skill(model, "extra9", "extra2", 1)
    plan = SkillPlan(("extra9", "general"))
    add_task(model, "task9", Task("classification", {"input": plan}, outputs=OUTPUTS))
    model.save_pretrained(base.parent / "grown")
    path = pack(base.parent / "grown", 9, base.parent / "p9.skill")
    add(base, path)
    memory = SkillNet.from_pretrained(base)
    present = hashes(base)
    message = "the skill extra2 is needed by extra9; remove that first"
    with pytest.raises(ValueError, match=message):
        remove_packages(base, ["p2"])
    with pytest.raises(ValueError, match=message):
        memory.remove("p2")
    assert hashes(base) == present
    memory.save_pretrained(base.parent / "memory")
    assert hashes(base.parent / "memory") == present
    remove_packages(base, ["p2", "p9"])
    assert hashes(base) == before
    # Both skills in one package, of which the dependent one has the first name.
    pack_skills(base.parent / "grown", ["task2", "task9"], path, program="0.1.0")
    edit_about(path, lambda about: about["skills"].reverse())
    add(base, path)
    memory = SkillNet.from_pretrained(shelf / "base")
    memory.add(path)
    memory.save_pretrained(base.parent / "memory")
    assert hashes(base.parent / "memory") == hashes(base)
    memory.remove("p9")
    remove_packages(base, ["p9"])
    assert hashes(base) == before


def test_any_order_and_any_subset_restore_every_byte(shelf: Path, base: Path) -> None:
    draw = random.Random(0)  # noqa: S311
    states = {frozenset[str](): hashes(base)}
    present: list[str] = []
    for _ in range(12):
        names = [f"p{number}" for number in range(3)]
        missing = [name for name in names if name not in present]
        if missing and (not present or draw.random() < 0.5):
            present.append(draw.choice(missing))
            add(base, shelf / f"{present[-1]}.skill")
        else:
            present.remove(gone := draw.choice(present))
            remove_packages(base, [gone])
        if not present:
            assert hashes(base) == states[frozenset()]
    if present:
        remove_packages(base, present)
    assert hashes(base) == states[frozenset()]


@pytest.mark.slow("test_skill_packages.py::test_any_order_and_any_subset_restore_every_byte")
def test_fifty_packages_of_fifty_folders_join_one_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each addition proves all old outputs; each package adds its own files and no others.

    Neither memory nor disk of an addition grows by more than the package, and its work not faster
    than the number of packages. Memory is that of the models that live at once, and work the number
    of calls, which no other process of the machine changes.
    """
    live: list[weakref.ref[SkillNet]] = []
    peaks: list[int] = []

    def load(folder: Path) -> SkillNet:
        live.append(weakref.ref(model := SkillNet.from_pretrained(folder)))
        models = [found for each in live if (found := each()) is not None]
        peaks.append(sum(p.nbytes for found in models for p in found.parameters()))
        return model

    monkeypatch.setattr("skillnet.package_joins._load", load)
    tasks = {"text_classification": small_model().config.tasks["text_classification"]}
    base, draw = tmp_path / "base", random.Random(2)  # noqa: S311
    small_model(torch.float32, tasks=tasks).save_pretrained(base)
    before, made = hashes(base), {}
    for number in range(50):
        folder = tmp_path / f"working{number}"
        folder.mkdir()
        start = Path(shutil.copytree(base, folder / "base"))
        made[f"p{number}"] = pack(
            grow(start, number, folder / "grown"), number, folder / f"p{number}.skill"
        )
    order = sorted(made)
    draw.shuffle(order)
    files, peak, work = list(before), 0, {}
    for number, name in enumerate(order):
        nodes = {path.stat().st_ino for path in base.iterdir()}
        peaks.clear()
        with cProfile.Profile() as profile:
            proofs = add(base, made[name])
        work[number] = pstats.Stats(profile).total_calls
        assert not any(proof.differing for proof in proofs)
        assert len(hashes(base)) - len(files) == 2, "a skill and a head"
        files = list(hashes(base))
        size = made[name].stat().st_size
        # All other files are links to those of before, but the two that name all packages.
        written = [path for path in base.iterdir() if path.stat().st_ino not in nodes]
        kept = [path for path in written if path.name not in ("config.json", "manifest.json")]
        assert sum(path.stat().st_size for path in kept) <= size
        assert not number or max(peaks) - peak <= size
        peak = max(peaks)
    assert work[49] - work[25] <= 1.2 * (work[25] - work[1]), "linear in the number of packages"
    assert len(list_packages(base)) == 50
    gone = draw.sample(order, 20)
    remove_packages(base, gone)
    left = hashes(base)
    remove_packages(base, [name for name in order if name not in gone])
    assert hashes(base) == before
    add(base, *(made[name] for name in order if name not in gone))
    assert hashes(base) == left, "the bytes depend on what is there, not on what was"


def test_a_stem_that_two_packages_bring_stays_until_both_are_gone(tmp_path: Path) -> None:
    tasks = {"text_classification": small_model().config.tasks["text_classification"]}
    small_model(torch.float32, tasks=tasks).save_pretrained(tmp_path / "base")
    before = hashes(tmp_path / "base")
    assert "stem-tubelet.safetensors" not in before
    first = grow(tmp_path / "base", 0, tmp_path / "one", "video")
    paths = [pack(first, 0, tmp_path / "one.skill")]
    second = grow(first, 1, tmp_path / "two", "video")
    model = SkillNet.from_pretrained(second)
    stem = next(name for name in hashes(first) if name.startswith("stem-") and name not in before)
    # Made from the first model, but without it: both bring the stem.
    paths.append(tmp_path / "two.skill")
    pack_skills(second, ["task0", "task1"], paths[1], program="0.1.0")
    del model
    add(tmp_path / "base", paths[0])
    with pytest.raises(ValueError, match="already has a skill 'extra0'"):
        add(tmp_path / "base", paths[1])
    assert stem in hashes(tmp_path / "base")
    remove_packages(tmp_path / "base", ["one"])
    add(tmp_path / "base", paths[1])
    remove_packages(tmp_path / "base", ["two"])
    assert hashes(tmp_path / "base") == before


def test_a_model_in_memory_takes_packages_as_its_folder_does(
    shelf: Path, base: Path, tmp_path: Path
) -> None:
    model = SkillNet.from_pretrained(base)
    model.save_pretrained(tmp_path / "before")
    for name in ("p0", "p1"):
        proofs = model.add(shelf / f"{name}.skill")
        assert not any(proof.differing for proof in proofs)
        add(base, shelf / f"{name}.skill")
    assert {k: v for k, v in model.skills().items() if v} == {"extra0": "p0", "extra1": "p1"}
    model.save_pretrained(tmp_path / "saved")
    assert hashes(tmp_path / "saved") == hashes(base)
    with pytest.raises(ValueError, match="already has a package 'p0'"):
        model.add(shelf / "p0.skill")
    again = SkillNet.from_pretrained(tmp_path / "saved")
    for name in ("p0", "p1"):
        again.remove(name)
    again.save_pretrained(tmp_path / "after")
    assert hashes(tmp_path / "after") == hashes(tmp_path / "before")
    with pytest.raises(ValueError, match="has no package 'p0'"):
        again.remove("p0")


@pytest.mark.parametrize(
    "fault", ["another base", "another type", "other outputs", "too few names", "no scale"]
)
def test_a_refused_package_leaves_a_model_in_memory_as_it_was(
    fault: str, shelf: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SkillNet.from_pretrained(base)
    if fault == "another base":
        with torch.no_grad():
            model.encoder.norm.weight.add_(1)
    elif fault == "another type":
        model.double()
    elif fault == "other outputs":
        monkeypatch.setattr("skillnet.package_joins.TOLERANCE", -1.0)
    path = Path(shutil.copy(shelf / "p0.skill", tmp_path / "bad.skill"))
    if fault == "too few names":
        edit_about(path, lambda about: about["tasks"]["task0"].update(names=["a"]))
    elif fault == "no scale":
        edit_about(path, lambda about: about["tasks"]["task0"].update(scale=[0.0, 0.0]))
    model.save_pretrained(tmp_path / "before")
    wanted = {
        "other outputs": "other outputs than its author",
        "too few names": "1 names and 3 outputs",
        "no scale": "a deviation above 0",
    }
    with pytest.raises(ValueError, match=wanted.get(fault, "made for another base")):
        model.add(path)
    model.save_pretrained(tmp_path / "after")
    assert hashes(tmp_path / "after") == hashes(tmp_path / "before")


def edit_about(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a package again whose ``skill.json`` was changed, as an attacker would."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    about = json.loads(files[ABOUT])
    change(about)
    files[ABOUT] = json.dumps(about).encode()
    write_zip(path, files)


def write_zip(path: Path, files: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, content in files.items():
            archive.writestr(name, content)


ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another base": (
        lambda a: a["base"].update({"shared.safetensors": "0" * 64}),
        "made for another base: its shared.safetensors is 0000000000000000",
    ),
    "a file that the base lacks": (
        lambda a: a["base"].update({"skill-none.safetensors": "0" * 64}),
        "lacks it",
    ),
    "another tokenizer": (lambda a: a.update(tokenizer="f" * 64), "made with the tokenizer ffff"),
    "another width": (lambda a: a["shape"].update(dim=16), r"model\.dim 16"),
    "another format": (lambda a: a.update(format=2), "format '2', this program reads 1"),
    "an unknown key": (lambda a: a.update(run="rm"), "run"),
    "a path": (
        lambda a: a["files"].update({"../x.safetensors": {"bytes": 1, "sha256": "0" * 64}}),
        "no file of a package",
    ),
    "a skill of the base": (
        lambda a: a.update(skills=["text"]),
        "files for other skills and tasks than it names",
    ),
    "no file of the base": (lambda a: a.update(base={}), "it has no shared.safetensors"),
    "a plan with an unknown skill": (
        lambda a: a["tasks"]["task0"]["plan"]["towers"]["input"].update(skills=["none"]),
        "none",
    ),
    "a plan that is no plan": (
        lambda a: a["tasks"]["task0"].update(plan={"objective": "os:system"}),
        ABOUT,
    ),
    "too many outputs": (
        lambda a: a["tasks"]["task0"]["plan"].update(outputs=10**9),
        "other weights|outputs",
    ),
    "too few names": (lambda a: a["tasks"]["task0"].update(names=["a"]), "1 names"),
    "a rank without factors": (
        lambda a: a.update(low_rank={"extra0": {"source": "text", "rank": 2}}),
        "other weights than its tasks need",
    ),
    "the rank of a skill of the base": (
        lambda a: a.update(low_rank={"image": {"source": "text", "rank": 2}}),
        "low_rank.image: the package has no such skill",
    ),
    "a huge rank": (
        lambda a: a.update(low_rank={"extra0": {"source": "text", "rank": 10**6}}),
        "1000000 is no low rank",
    ),
    "a difference to itself": (
        lambda a: a.update(low_rank={"extra0": {"source": "extra0", "rank": 1}}),
        "a difference to itself",
    ),
    "a source that is not there": (
        lambda a: a.update(low_rank={"extra0": {"source": "none", "rank": 1}}),
        "unknown skill 'none'",
    ),
    "more than a rank": (
        lambda a: a.update(low_rank={"extra0": {"source": "text", "rank": 1, "run": "rm"}}),
        "low_rank.extra0.run",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_package_that_does_not_fit_is_refused_in_one_sentence(
    attack: str, shelf: Path, base: Path, tmp_path: Path
) -> None:
    before = hashes(base)
    path = Path(shutil.copy(shelf / "p0.skill", tmp_path / "bad.skill"))
    if attack == "another tokenizer":
        model = SkillNet.from_pretrained(base)
        model.vocabulary = ModelVocabulary("e" * 64, {}, {})
        model.save_pretrained(base)
        before = hashes(base)
    change, message = ATTACKS[attack]
    edit_about(path, change)
    with pytest.raises(ValueError, match=message) as caught:
        add(base, path)
    assert "\n" not in str(caught.value)
    assert hashes(base) == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "bad.skill"}, "nothing is left"


def test_a_name_that_is_taken_is_refused(shelf: Path, base: Path, tmp_path: Path) -> None:
    add(base, shelf / "p0.skill")
    with pytest.raises(ValueError, match="already has a package 'p0'"):
        add(base, shelf / "p0.skill")
    again = shutil.copy(shelf / "p0.skill", tmp_path / "again.skill")
    edit_about(Path(again), lambda about: about.update(name="again"))
    with pytest.raises(ValueError, match="already has a skill 'extra0'"):
        add(base, Path(again))
    with pytest.raises(ValueError, match="has no package 'p00'; did you mean 'p0'"):
        remove_packages(base, ["p00"])


def test_all_or_none_of_several_packages_are_added(shelf: Path, base: Path, tmp_path: Path) -> None:
    before = hashes(base)
    path = Path(shutil.copy(shelf / "p1.skill", tmp_path / "bad.skill"))
    edit_about(path, lambda about: about["base"].update({"shared.safetensors": "0" * 64}))
    with pytest.raises(ValueError, match="another base"):
        add(base, shelf / "p0.skill", path)
    assert hashes(base) == before


def test_outputs_that_are_not_those_of_the_author_are_refused(
    shelf: Path, base: Path, tmp_path: Path
) -> None:
    """The weights of another skill, with hashes that fit."""
    with zipfile.ZipFile(shelf / "p0.skill") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    name = "skill-extra0.safetensors"
    content = bytearray(files[name])
    content[-400:] = b"\x00\x00\x80\x40" * 100  # 4.0
    files[name] = bytes(content)
    about = json.loads(files[ABOUT])
    about["files"][name]["sha256"] = hashlib.sha256(content).hexdigest()
    files[ABOUT] = json.dumps(about).encode()
    write_zip(tmp_path / "bad.skill", files)
    with pytest.raises(ValueError, match="computes other outputs than its author measured"):
        add(base, tmp_path / "bad.skill")


def test_compressed_files_and_duplicates_are_refused(
    shelf: Path, base: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(shelf / "p0.skill") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    write_zip(tmp_path / "bad.skill", files, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed or encrypted"):
        add(base, tmp_path / "bad.skill")
    with zipfile.ZipFile(tmp_path / "bad.skill", "w") as archive:
        archive.writestr(ABOUT, files[ABOUT])
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(ABOUT, files[ABOUT])
    with pytest.raises(ValueError, match="two of one name"):
        add(base, tmp_path / "bad.skill")
    write_zip(tmp_path / "bad.skill", {name: files[name] for name in (ABOUT, PROBES)})
    with pytest.raises(ValueError, match="its files are not those"):
        add(base, tmp_path / "bad.skill")


def test_a_thousand_damaged_packages_are_refused_and_change_nothing(
    shelf: Path, base: Path, tmp_path: Path
) -> None:
    """Bytes are changed, cut out, doubled and appended at random places."""
    before, draw = hashes(base), random.Random(1)  # noqa: S311
    made = [(shelf / f"{name}.skill").read_bytes() for name in ("p0", "p2")]
    path, accepted, messages = tmp_path / "bad.skill", 0, set()
    for number in range(1000):
        whole = made[number % 2]  # whole matrices, and low rank
        data, place = bytearray(whole), draw.randrange(len(whole))
        kind = draw.randrange(4)
        if kind == 0:
            data[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place : place + draw.randrange(1, 64)]
        elif kind == 2:
            data[place:place] = data[place : place + draw.randrange(1, 64)]
        else:
            del data[place:]
        if data == whole:
            continue
        path.write_bytes(data)
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            stated = hashlib.sha256(archive.read(ABOUT)).hexdigest()
        # A catalogue reads the header alone: what it shows is what the author stated.
        try:
            assert read_package_header(io.BytesIO(data), path).digest == stated
        except ValueError as error:
            messages.add(str(error))
        try:
            with open_package(path, tmp_path / "opened") as package:
                # A flipped bit of a date or of a comment of the zip changes no content.
                accepted += 1
                for name, entry in package.content.files.items():
                    found = package.find_file(name).read_bytes()
                    assert hashlib.sha256(found).hexdigest() == entry.sha256
                    assert read_tensor_shapes(package.find_file(name))
                assert package.digest == stated
        except ValueError as error:
            messages.add(str(error))
    assert accepted < 100
    assert not [message for message in messages if "\n" in message]
    assert hashes(base) == before
    assert {p.name for p in tmp_path.iterdir()} == {"model", "bad.skill"}


def test_a_model_without_a_base_cannot_be_packed(shelf: Path, tmp_path: Path) -> None:
    model = SkillNet.from_pretrained(shelf / "grown0", "task0")
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="holds no base"):
        pack_skills(tmp_path / "alone", ["task0"], tmp_path / "x.skill", program="0.1.0")
    with pytest.raises(ValueError, match=r"ends with \.skill"):
        pack_skills(shelf / "grown0", ["task0"], tmp_path / "x.zip", program="0.1.0")
