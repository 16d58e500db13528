"""Configuration: layers in order, merging by name, and errors that name key, file and remedy."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from skillnet.config import SkillNetConfig
from skillnet_platform import config
from skillnet_platform.config import safe_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.secret_uri import SecretUri
from skillnet_studies.config.study import StudyConfig
from sweeps.config.sweep import SweepConfig


@dataclass
class Part:
    """One part.

    Args:
        corpus: what it reads.
        weight: how much of it.
    """

    corpus: str
    weight: float | None = None
    batch: int = 32


@dataclass
class Example:
    """An example.

    Args:
        name: for people.
        lr: the learning rate,
            at its peak.
    """

    query: str = config.positional_field("")
    name: str = "x"
    model: SkillNetConfig = field(default_factory=SkillNetConfig)
    parts: dict[str, Part] = field(default_factory=lambda: {"a": Part("headings")})
    lr: float = 1e-3
    open: bool = False
    precision: Literal["auto", "bf16"] = "auto"
    sizes: list[int] = field(default_factory=lambda: [1, 2])


def parse(*argv: str) -> Example:
    return config.parse_config(Example, argv, prog="skillnet example", description="Do it.")


def test_later_layers_win(tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("{lr: 0.1, name: first, model: {dim: 64}}")
    second.write_text("{name: second}")
    made = parse("--config", str(first), "--config", str(second), "--model.num_layers", "2")
    assert (made.lr, made.name, made.model.dim, made.model.num_layers) == (0.1, "second", 64, 2)
    assert made.model.num_heads == SkillNetConfig().num_heads


def test_a_mapping_starts_from_another_file(tmp_path: Path) -> None:
    (tmp_path / "sizes.yaml").write_text("{dim: 64, num_layers: 3, tasks: {text_to_code: null}}")
    outer = tmp_path / "outer.yaml"
    outer.write_text("model: {include: sizes.yaml, num_layers: 2, tasks: {text_to_image: null}}")
    made = parse("--config", str(outer), "--model.num_heads", "2")
    assert (made.model.dim, made.model.num_layers, made.model.num_heads) == (64, 2, 2)
    assert not {"text_to_code", "text_to_image"} & made.model.tasks.keys()
    (tmp_path / "sizes.yaml").write_text("{tasks: {own: {objective: ctc, towers: {}}}}")
    outer.write_text("{model: {include: sizes.yaml, tasks: {own: null, text_to_code: null}}}")
    assert not {"text_to_code", "own"} & parse("--config", str(outer)).model.tasks.keys()
    outer.write_text("{include: tiny, training: {steps: 7}}")
    layer = config.load_layer(outer)
    assert layer["training"]["steps"] == 7
    assert layer["model"] == config.load_yaml(config.find_config("tiny"))["model"]
    (tmp_path / "sizes.yaml").write_text("{include: outer.yaml}")
    outer.write_text("model: {include: sizes.yaml}")
    with pytest.raises(UserError, match=r"include: outer.yaml includes itself"):
        parse("--config", str(outer))
    outer.write_text("model: {include: sizs}")
    with pytest.raises(UserError, match="neither a file nor a preset"):
        parse("--config", str(outer))


def test_overriding_one_task_keeps_the_others(tmp_path: Path) -> None:
    file = tmp_path / "video.yaml"
    skills = "[general, image, video, alignment]"
    file.write_text(
        f"""
        model:
          tasks:
            text_to_video:
              towers:
                candidate: {{skills: {skills}, modality: video}}
        """
    )
    tasks = parse("--config", str(file)).model.tasks
    expected = SkillNetConfig().tasks
    assert set(tasks) == set(expected)
    assert set(tasks["text_to_video"].towers["candidate"].skills) == {
        "general",
        "image",
        "video",
        "alignment",
    }
    assert tasks["text_to_video"].towers["query"] == expected["text_to_video"].towers["query"]
    assert tasks["text_to_image"] == expected["text_to_image"]


@dataclass
class Chosen:
    """An example whose default parts apply only together."""

    parts: dict[str, Part] = config.choices_field(
        lambda: {"a": Part("headings", batch=1), "b": Part("drawings")}, "corpus"
    )


@dataclass
class Outer:
    """A configuration with the example below a key."""

    inner: Chosen = field(default_factory=Chosen)


def choose(*argv: str) -> dict[str, str]:
    made = config.parse_config(Outer, argv, prog="skillnet example").inner.parts
    return {name: part.corpus for name, part in made.items()}


def test_defaults_apply_together_or_as_far_as_they_are_chosen(tmp_path: Path) -> None:
    assert choose() == {"a": "headings", "b": "drawings"}
    assert choose("--inner.parts.b", "null") == {"a": "headings"}
    assert choose("--inner.parts.b.weight", "2") == {"a": "headings", "b": "drawings"}
    assert choose("--inner.parts.a.corpus", "mine") == {"a": "mine"}
    assert choose("--inner.parts.c.corpus", "mine") == {"c": "mine"}
    preset, chosen = tmp_path / "preset.yaml", tmp_path / "chosen.yaml"
    preset.write_text("inner: {parts: {a: {batch: 4}, b: {batch: 5}}}")
    chosen.write_text("inner: {parts: {a: {corpus: one}, b: {corpus: two}}}")
    # Settings of a preset for other entries are no choice; its corpora are.
    assert choose("--config", str(preset), "--inner.parts.b.corpus", "mine") == {"b": "mine"}
    words = ("--config", str(chosen), "--inner.parts.b.corpus", "mine")
    assert choose(*words) == {"a": "one", "b": "mine"}
    assert choose(*words, "--inner.parts.a", "null") == {"b": "mine"}


@pytest.mark.parametrize(
    "including",
    [
        "{inner: {include: parts.yaml, parts: {b: {corpus: mine}}}}",
        "{inner: {parts: {include: named.yaml, b: {corpus: mine}}}}",
        "{include: outer.yaml, inner: {parts: {b: {corpus: mine}}}}",
        "{include: twice.yaml, inner: {parts: {b: {corpus: mine}}}}",
    ],
)
def test_settings_of_an_included_file_are_no_choice(tmp_path: Path, including: str) -> None:
    """As those of an earlier ``--config``; the file cannot remove a line of a preset."""
    for name, text in {
        "parts": "parts: {a: {batch: 4}, b: {batch: 5}}",
        "named": "{a: {batch: 4}, b: {batch: 5}}",
        "outer": "inner: {parts: {a: {batch: 4}, b: {batch: 5}}}",
        "twice": "{include: outer.yaml, inner: {parts: {a: {weight: 2}}}}",
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    file = tmp_path / "run.yaml"
    file.write_text(including)
    assert choose("--config", str(file)) == {"b": "mine"}
    # Corpora of an included file are a choice, as those of an earlier --config.
    (tmp_path / "outer.yaml").write_text("inner: {parts: {a: {corpus: one}}}")
    file.write_text("{include: outer.yaml, inner: {parts: {b: {corpus: mine}}}}")
    assert choose("--config", str(file)) == {"a": "one", "b": "mine"}
    # Its own settings for another entry stay an error.
    file.write_text("{include: outer.yaml, inner: {parts: {b: {weight: 2}, c: {corpus: mine}}}}")
    with pytest.raises(UserError, match=r"run\.yaml: inner\.parts\.b has no corpus"):
        choose("--config", str(file))


@pytest.mark.parametrize("preset", ["tiny", "small", "base"])
def test_sweeps_and_studies_of_tasks_of_your_own_start_from_a_preset(
    tmp_path: Path, preset: str
) -> None:
    run = f"run: {{include: {preset}, tasks: {{mood: {{corpus: reviews}}}}}}\n"
    (tmp_path / "sweep.yaml").write_text(f"{run}space: {{training.lr: {{choice: [0.1, 0.2]}}}}")
    (tmp_path / "study.yaml").write_text(f"{run}systems: {{a: {{system: dense}}}}")
    for cls, name in ((SweepConfig, "sweep"), (StudyConfig, "study")):
        made = config.parse_config(cls, ["--config", str(tmp_path / f"{name}.yaml")], prog="x")
        assert {task: each.corpus for task, each in made.run.tasks.items()} == {"mood": "reviews"}


def test_settings_of_an_entry_that_is_not_chosen_are_rejected(tmp_path: Path) -> None:
    words = ("--inner.parts.a.corpus", "mine", "--inner.parts.b.weight", "2")
    message = "inner.parts.b has no corpus. inner.parts.a.corpus is mine, so only inner.parts with"
    with pytest.raises(UserError, match=f"^command line: {message}"):
        choose(*words)
    file = tmp_path / "run.yaml"
    file.write_text("inner: {parts: {a: {corpus: mine}, b: {weight: 2}}}")
    with pytest.raises(UserError, match=f"run.yaml: {message}"):
        choose("--config", str(file))
    assert choose("--config", str(file), "--inner.parts.b.corpus", "too") == {
        "a": "mine",
        "b": "too",
    }


def test_dotted_override_reaches_into_a_plan() -> None:
    key = "--model.tasks.text_to_video.towers.candidate.skills"
    for text in ("[general,image,alignment]", "general,image,alignment"):
        plan = parse(key, text).model.tasks["text_to_video"].towers["candidate"]
        assert plan.skills == ("alignment", "general", "image")
        assert plan.modality == "video"


def test_a_new_entry_of_a_dictionary_gets_its_type() -> None:
    made = parse("--parts.b.corpus", "drawings", "--parts.b.weight=2")
    assert made.parts == {"a": Part("headings"), "b": Part("drawings", 2.0)}


def test_words_of_the_command_line_become_values() -> None:
    made = parse("红色的心", "--open", "--lr", "1e-4", "--name", "5", "--sizes", "3,4")
    assert (made.query, made.open, made.lr, made.name) == ("红色的心", True, 1e-4, "5")
    assert made.sizes == [3, 4]
    assert parse("--open", "false").open is False
    assert parse("--", "--literal").query == "--literal"


def test_resolved_configuration_reads_back_equal(tmp_path: Path) -> None:
    made = parse("--model.dim", "64", "--parts.b.corpus", "x", "--name", "名字")
    file = tmp_path / "resolved.yaml"
    file.write_text(config.to_yaml(made), encoding="utf-8")
    again = parse("--config", str(file))
    assert again == made
    assert config.digest_config(again) == config.digest_config(made)
    assert config.digest_config(parse()) != config.digest_config(made)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("-2E3", -2000.0), ("1.5e+3", 1500.0), (".5e1", 5.0), ("1e5x", "1e5x")],
)
def test_a_number_with_an_exponent_is_a_number(text: str, value: object) -> None:
    assert safe_yaml.load_plain_yaml(text) == value


@pytest.mark.parametrize("name", ["1e5", "12E04", "5", "true", "null", "2026-01-02", "0x1", "名"])
def test_text_stays_text_in_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "resolved.yaml"
    file.write_text(config.to_yaml(parse("--name", name)), encoding="utf-8")
    assert parse("--config", str(file)).name == name


def test_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert config.digest_config({"a": 1, "b": [1, 2]}) == config.digest_config(
        {"b": (1, 2), "a": 1}
    )
    assert config.digest_config({"b": [2, 1]}) != config.digest_config({"b": [1, 2]})


def test_flatten_keeps_lists_and_empty_mappings() -> None:
    flat = config.flatten_tree({"a": {"b": 1, "c": {}}, "d": [1]})
    assert flat == {"a.b": 1, "a.c": {}, "d": [1]}


def test_help_shows_keys_types_defaults_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        config.parse_config(
            Example, ["--help", "all"], "skillnet example", example="skillnet example 心"
        )
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "[QUERY]" in text
    assert "the learning rate, at its peak. (a number; default 0.001)" in text
    assert "--model.skill_every" in text
    assert "--parts.NAME.corpus" in text
    assert "skillnet example 心" in text


def test_a_required_word_is_asked_for() -> None:
    @dataclass
    class Needs:
        text: str = config.positional_field()

    with pytest.raises(UserError, match="text is missing"):
        config.parse_config(Needs, [], prog="skillnet needs")


def test_every_bare_word_goes_into_a_list() -> None:
    @dataclass
    class Many:
        names: list[str] = config.positional_field([])

    assert config.parse_config(Many, ["a", "b"], prog="x").names == ["a", "b"]
    assert config.parse_config(Many, [], prog="x").names == []


def test_presets_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs" / "tasks").mkdir(parents=True)
    (tmp_path / "configs" / "quick.yaml").write_text("lr: 0.5")
    (tmp_path / "configs" / "tasks" / "two.yaml").write_text("name: two")
    monkeypatch.chdir(tmp_path)
    made = parse("--config", "quick", "--config", "tasks/two")
    assert (made.lr, made.name) == (0.5, "two")
    with pytest.raises(UserError, match="did you mean 'quick'"):
        parse("--config", "qiuck")


def test_a_built_in_preset_wins_over_files_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built_in = config.find_config("tiny")
    assert not capsys.readouterr().err
    (tmp_path / "configs").mkdir()
    own = tmp_path / "configs" / "tiny.yaml"
    own.write_text("lr: 0.5")
    monkeypatch.chdir(tmp_path)
    assert config.find_config("tiny") == built_in
    note = " ".join(capsys.readouterr().err.split())
    assert "--config tiny: takes the built-in preset, not the file configs/tiny.yaml" in note
    assert "give --config configs/tiny.yaml" in note
    for name in ("configs/tiny.yaml", "./configs/tiny.yaml", str(own)):
        assert config.find_config(name).read_text() == "lr: 0.5"
    assert not capsys.readouterr().err
    (tmp_path / "small").write_text("lr: 0.25")
    assert config.find_config("small").name == "small.yaml"
    assert "not the file ./small;" in " ".join(capsys.readouterr().err.split())
    assert config.find_config("./small").read_text() == "lr: 0.25"


def test_an_included_preset_is_the_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "tiny").write_text("lr: 0.5")
    (tmp_path / "outer.yaml").write_text("include: tiny")
    built_in = config.load_yaml(config.find_config("tiny"))
    assert config.load_layer(tmp_path / "outer.yaml") == built_in


def _tree() -> dict[str, Any]:
    return {"a": {"x": 1}, "b": [1, 2]}


def test_merge_joins_mappings_and_replaces_the_rest() -> None:
    merged = config.merge_trees(_tree(), {"a": {"y": 2}, "b": [3]})
    assert merged == {"a": {"x": 1, "y": 2}, "b": [3]}


def test_a_null_where_none_may_be_is_named() -> None:
    with pytest.raises(UserError, match="lr: expected a number, got null"):
        parse("--lr", "null")
    assert parse("--parts.a.weight", "null").parts["a"].weight is None


@dataclass
class SearchRange:
    """A range. Args: low: lowest."""

    loguniform: list[float] = field(default_factory=list)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class SearchedRun:
    """A run whose keys are searched."""

    space: dict[str, SearchRange] = field(default_factory=dict)


@pytest.mark.parametrize("name", ["lr", "training.lr", "model.tasks.a.towers.input"])
def test_names_of_entries_may_have_dots(name: str) -> None:
    parsed = config.parse_config(
        SearchedRun,
        [f"--space.{name}.loguniform", "1e-4,1e-2", f"--space.{name}.options.a.lr", "3"],
        "test",
    )
    assert parsed.space == {name: SearchRange([1e-4, 1e-2], {"a": {"lr": 3}})}


def test_a_wrong_key_of_an_entry_with_dots_is_named() -> None:
    with pytest.raises(UserError, match=r"did you mean 'space.training.lr.loguniform'"):
        config.parse_config(SearchedRun, ["--space.training.lr.loguniforn", "1,2"], "test")


def test_values_keep_their_kind_on_the_way_into_a_dataclass() -> None:
    """A worker gets the configuration with its secrets; a file may have undecodable bytes."""
    secret = SecretUri("s3://user:word@host/place")
    made = config.build_config(Example, {"name": secret, "sizes": (3, 4), "lr": 1})
    assert made.name is secret
    assert (made.sizes, made.lr, type(made.lr)) == ([3, 4], 1.0, float)
    assert config.build_config(Example, {"name": "\udcff"}).name == "\udcff"
    with pytest.raises(UserError, match="sizes: expected a list, each a whole number"):
        config.build_config(Example, {"sizes": {3}})
