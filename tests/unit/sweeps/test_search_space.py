"""Search spaces: points, errors that are found before anything starts, width at fixed cost."""

import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config.run import FinetuneConfig
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.study.tuning import spread_points
from sweeps.config.space import SearchDimension
from sweeps.config.sweep import SweepConfig
from sweeps.config.trials import FixedCostConfig, ScoreConfig
from sweeps.search.space import SearchSpace, compute_model_cost, fit_fixed_cost
from sweeps.search.strategies import OptunaSource, configurations_from_points
from sweeps.sweep import _build_source
from sweeps.trials.trial import PROPOSALS, Trial, TrialOutcome

PRESETS = sorted((Path(__file__).parents[3] / "configs" / "sweeps").glob("*.yaml"))
VIDEO = "model.tasks.text_to_video.towers.candidate.skills"


def space(dimensions: dict[str, Any]) -> SearchSpace:
    return SearchSpace(
        {name: SearchDimension(**kind) for name, kind in dimensions.items()}, FinetuneConfig()
    )


@pytest.mark.parametrize(
    ("key", "kind", "expected"),
    [
        ("training.lrr", {"choice": [1.0]}, "did you mean 'training.lr'"),
        ("model.tasks.text_to_vidio.towers.candidate.skills", {"choice": [["video"]]},
         "did you mean 'text_to_video'"),
        (VIDEO.replace("candidate", "candidat"), {"choice": [["video"]]}, "'candidate'"),
        ("training.lr", {"choice": [0.001, "fast"]}, r"choice: training\.lr: expected a number"),
        ("model.skill_modules", {"choice": ["atention"]}, "one of both, attention, feedforward"),
        (VIDEO, {"choice": ["video"]}, "expected a list"),
        ("training.steps", {"uniform": [1, 9]}, "takes whole numbers; use integer"),
        ("model.skill_modules", {"integer": [1, 2]}, "does not take numbers"),
        ("training.lr", {"loguniform": [0, 1]}, "low must be above 0"),
        ("training.lr", {"uniform": [1, 0]}, "low < high"),
        ("training.lr", {"uniform": [0, 1], "choice": [1.0]}, "not choice and uniform"),
        ("training.lr", {}, "not nothing"),
        ("training.lr", {"choice": [1.0, 1.0]}, "occurs twice"),
        ("training", {"choice": [1]}, "name a key below it"),
        ("seed", {"choice": [1]}, "use seeds"),
        ("tracking.uri", {"choice": ["x"]}, "once for the sweep"),
        ("system", {"choice": ["dense", "moee"]}, "system.choice: unknown system 'moee'"),
        ("text tower", {"options": {"own": {"model.skils": ["text"]}}},
         "did you mean 'model.skills'"),
    ],
)  # fmt: skip
def test_errors_in_a_space_are_found_at_once(key: str, kind: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        space({key: kind})


def test_two_dimensions_cannot_set_one_key() -> None:
    with pytest.raises(UserError, match=r"training\.lr is set by both"):
        space(
            {"training.lr": {"choice": [0.1]}, "pace": {"options": {"slow": {"training.lr": 1.0}}}}
        )


def test_a_grid_combines_values_and_options_set_several_keys() -> None:
    made = space(
        {
            "model.skill_every": {"choice": [1, 2]},
            "text tower": {
                "options": {
                    "shared": {},
                    "own": {
                        "model.skills": ["general", "text", "image", "sound", "video", "code",
                                         "alignment", "ask"],
                        "model.tasks.text_to_image.towers.query.skills": ["general", "ask"],
                    },
                }
            },
        }
    )  # fmt: skip
    points = list(made.grid_points())
    assert len(points) == 4
    config = made.apply_point({"model.skill_every": 2, "text tower": "own"})
    assert config.model.skill_every == 2
    assert config.model.tasks["text_to_image"].towers["query"].skills == ("ask", "general")
    assert config.model.tasks["text_to_code"].towers["query"].skills == (
        "alignment", "general", "text",
    )  # fmt: skip
    assert FinetuneConfig() == made.apply_point({"model.skill_every": 1, "text tower": "shared"})


def test_random_points_are_distinct_in_range_and_reproducible() -> None:
    made = space(
        {
            "training.lr": {"loguniform": [1e-4, 1e-2]},
            "model.num_layers": {"integer": [2, 4]},
            "model.ffn_dim": {"log_integer": [8, 64]},
            "training.max_grad_norm": {"uniform": [0.5, 2.0]},
            "model.skill_every": {"grid": [1, 2]},
        }
    )
    points = list(made.random_points(60, seed=3))
    assert points == list(made.random_points(60, seed=3))
    assert points != list(made.random_points(60, seed=4))
    assert len(points) == 120
    assert Counter(p["model.skill_every"] for p in points) == {1: 60, 2: 60}
    assert {p["model.num_layers"] for p in points} == {2, 3, 4}
    assert all(1e-4 <= p["training.lr"] <= 1e-2 for p in points)
    # Half of a log-uniform range lies below its geometric mean.
    low = sum(p["training.lr"] < 1e-3 for p in points)
    assert 30 < low < 90
    assert all(8 <= p["model.ffn_dim"] <= 64 for p in points)
    small = space({"model.skill_every": {"choice": [1, 2]}})
    assert len(list(small.random_points(9, seed=0))) == 2


def test_latin_hypercube_points_cover_every_part_of_a_range() -> None:
    made = space(
        {
            "training.lr": {"loguniform": [1e-4, 1e-2]},
            "model.num_layers": {"integer": [1, 8]},
            "training.max_grad_norm": {"uniform": [0.5, 2.5]},
            "model.skill_every": {"choice": [1, 2]},
        }
    )
    points = made.latin_hypercube_points(8, seed=3)
    assert points == made.latin_hypercube_points(8, seed=3)
    assert points != made.latin_hypercube_points(8, seed=4)
    eighths = [math.floor(8 * math.log(p["training.lr"] / 1e-4, 100)) for p in points]
    assert sorted(eighths) == list(range(8))
    assert sorted(p["model.num_layers"] for p in points) == list(range(1, 9))
    assert sorted(math.floor((p["training.max_grad_norm"] - 0.5) * 4) for p in points) == list(
        range(8)
    )
    assert Counter(p["model.skill_every"] for p in points) == {1: 4, 2: 4}
    assert (
        made.latin_hypercube_points(0, seed=3) == space({}).latin_hypercube_points(4, seed=3) == []
    )


def test_incompatible_values_are_named() -> None:
    made = space({"model.dim": {"choice": [192, 200]}, "model.num_heads": {"choice": [4, 3]}})
    with pytest.raises(
        UserError, match=r"must divide by .*with model\.dim 200, model\.num_heads 3"
    ):
        configurations_from_points(made, made.grid_points(), lambda config: config)
    unknown = space({VIDEO: {"choice": [["general", "vidio"]]}})
    with pytest.raises(UserError, match="unknown skill 'vidio'; did you mean 'video'"):
        configurations_from_points(unknown, unknown.grid_points(), lambda config: config)


def test_optuna_checks_every_listed_value_before_it_starts(tmp_path: Path) -> None:
    pairs = itertools.combinations(["general", "image", "text", "video", "code", "sound"], 2)
    plans = [list(pair) for pair in pairs]
    plans.insert(len(plans) // 2, ["general", "vidio"])
    with pytest.raises(UserError, match="unknown skill 'vidio'; did you mean 'video'"):
        OptunaSource(space({VIDEO: {"choice": plans}}), 2, [0], 0, lambda config: config, tmp_path)


@pytest.mark.parametrize("adjust", ["ffn_dim", "dim"])
def test_width_at_fixed_cost(adjust: Any) -> None:
    base = FinetuneConfig()
    target = compute_model_cost(base)
    made = space({"model.skill_modules": {"choice": ["feedforward"]}, "model.skill_every": {
        "choice": [2]}})  # fmt: skip
    plain = made.apply_point({"model.skill_modules": "feedforward", "model.skill_every": 2})
    assert compute_model_cost(plain) < 0.9 * target
    config = fit_fixed_cost(plain, target, FixedCostConfig(adjust=adjust, tolerance=0.01))
    assert abs(compute_model_cost(config) / target - 1) <= 0.01
    assert getattr(config.model, adjust) > getattr(base.model, adjust)
    assert (config.model.ffn_dim == base.model.ffn_dim) == (adjust == "dim")
    with pytest.raises(UserError, match=r"no model\.dim comes within 0\.001 %"):
        fit_fixed_cost(plain, target, FixedCostConfig(adjust="dim", tolerance=1e-5))


def guided(folder: Path) -> OptunaSource:
    made = space({"training.lr": {"loguniform": [1e-4, 1e-1]}, VIDEO: {
        "choice": [["general", "video"], ["general", "image", "video"]]}})  # fmt: skip
    folder.mkdir(exist_ok=True)
    return OptunaSource(made, 12, [0, 1], 0, lambda config: config, folder)


def finish(source: OptunaSource, trial: Trial) -> None:
    """Report the end of a trial; an image skill and a rate near 0.001 score best."""
    image = "image" in trial.settings[VIDEO]
    score = 0.5 * image - abs(trial.config.training.lr - 1e-3) + 0.01 * trial.config.seed
    report = {"step": 1, "score": score, "scores": {}}
    assert trial.group is not None
    source.record_outcome(
        TrialOutcome(
            trial.name, trial.group, Path(), "finished", {"step": 1}, [report],
            settings=dict(trial.settings), seed=trial.config.seed,
        )
    )  # fmt: skip


def run_guided(source: OptunaSource, count: int = 24, concurrent: int = 1) -> list[dict[str, Any]]:
    """Run trials until ``count`` have started; return their settings. The last do not end."""
    points: list[dict[str, Any]] = []
    live: list[Trial] = []
    while len(points) < count:
        trial = source.next_trial()
        points.append(dict(trial.settings))
        live.append(trial)
        if len(live) == concurrent and len(points) < count:
            finish(source, live.pop(0))
    return points


def test_optuna_finds_the_better_half(tmp_path: Path) -> None:
    source = guided(tmp_path)
    points = run_guided(source)
    assert source.next_trial() is None
    assert source.is_exhausted()
    for one, other in zip(points[::2], points[1::2], strict=True):
        assert one == other, "both seeds of a configuration before the next is proposed"
    assert sum("image" in point[VIDEO] for point in points[16::2]) >= 3


@pytest.mark.parametrize("killed_after", [1, 2, 6, 9, 19])
def test_a_resumed_optuna_sweep_draws_the_points_of_an_uninterrupted_one(killed_after, tmp_path):
    wanted = run_guided(guided(tmp_path / "whole"))
    before = run_guided(guided(tmp_path / "killed"), killed_after)
    after = run_guided(guided(tmp_path / "killed"))
    assert before == wanted[:killed_after]
    assert after == wanted


def test_no_draw_repeats_if_concurrent_trials_were_killed(tmp_path: Path) -> None:
    for count in (5, 11, 17):
        run_guided(guided(tmp_path), count, concurrent=4)
    points = run_guided(guided(tmp_path), concurrent=4)
    assert len({point["training.lr"] for point in points}) == 12
    assert [json.loads(line) for line in (tmp_path / PROPOSALS).open()] == points[::2]


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_the_shipped_sweeps_have_valid_spaces(path: Path) -> None:
    config = configuration.parse_config(SweepConfig, ["--config", str(path)], "skillnet sweep")
    made = SearchSpace(config.space, config.run)
    points = made.random_points(3, 0) if config.search == "optuna" else made.grid_points()
    target = compute_model_cost(config.run)
    configurations = configurations_from_points(
        made, points, lambda c: fit_fixed_cost(c, target, config.fixed_cost)
    )
    assert len(configurations) * len(config.seeds) <= 16
    if config.fixed_cost.adjust:
        for each in configurations:
            assert abs(compute_model_cost(each.config) / target - 1) <= config.fixed_cost.tolerance


def test_plain_and_relative_scores() -> None:
    def row(task: str, metric: str, value: float, split: str = "validation") -> dict[str, Any]:
        return {"task": task, "metric": metric, "value": value, "split": split}

    rows = [
        row("text_classification", "accuracy", 0.6),
        row("text_classification", "accuracy", 0.9, "test"),
        row("text_classification", "macro_f1", 0.1),
        row("speech_recognition", "token_error_rate", 0.8),
        row("text_to_image", "recall_at_10", 0.1),
    ]
    plain, scores = ScoreConfig().compute_score(rows)
    assert scores == pytest.approx(
        {"text_classification": 0.6, "speech_recognition": 0.2, "text_to_image": 0.1}
    )
    assert plain == pytest.approx(0.3)
    assert (
        ScoreConfig().compute_score([row("speech_recognition", "token_error_rate", 7.0)])[0] == 0.0
    )
    relative = ScoreConfig(
        "relative",
        tasks=["text_classification", "text_to_image"],
        references={"text_classification": 0.5, "text_to_image": 0.2},
    )
    assert relative.compute_score(rows)[0] == pytest.approx((1.2 + 0.5) / 2)
    with pytest.raises(UserError, match=r"needs score\.references\.text_to_image"):
        ScoreConfig("relative", references={"text_classification": 1.0}).check(
            ["text_classification", "text_to_image"]
        )
    with pytest.raises(UserError, match="did you mean 'text_to_image'"):
        ScoreConfig(tasks=["text_to_imag"]).check(["text_to_image"])


# -- each configuration once ---------------------------------------------------------------

SMALL_SPACES: dict[str, tuple[dict[str, Any], int]] = {
    "lists": ({"model.skill_every": {"choice": [1, 2]}, "model.num_layers": {"choice": [2, 3]}}, 4),
    "whole numbers": ({"model.num_layers": {"integer": [1, 5]}}, 5),
    "uneven numbers": ({"model.ffn_dim": {"log_integer": [1, 12]}}, 12),
    "options": (
        {"pace": {"options": {"slow": {"training.lr": 1e-4}, "fast": {"training.lr": 1e-2}}}},
        2,
    ),
    # Skills have no order, and 1 is 1.0.
    "synonyms": (
        {
            VIDEO: {"choice": [["general", "video"], ["video", "general"]]},
            "training.weight_decay": {"choice": [0, 0.0, 0.1]},
        },
        2,
    ),
}


@pytest.mark.parametrize("name", SMALL_SPACES)
@pytest.mark.parametrize("search", ["random", "optuna", "grid", "tuning"])
@pytest.mark.parametrize("more", [-1, 0, 5])
def test_a_small_space_is_tried_completely_and_once(name, search, more, tmp_path):
    """Optuna trained 4 distinct of 8 configurations under Ray; random stopped without a word."""
    dimensions, size = SMALL_SPACES[name]
    if search == "grid" and "numbers" in name:
        pytest.skip("a grid has lists")
    made, count = space(dimensions), size + more
    if search == "optuna":
        source = OptunaSource(made, count, [0, 1], 0, lambda config: config, tmp_path)
        live: list[Trial] = []
        candidates = []
        # Several trials run at once, as under Ray, and Optuna knows their scores later.
        while (trial := source.next_trial()) is not None:
            candidates.append(trial.config)
            live.append(trial)
            if len(live) > 5:
                end_trial(source, live.pop(0))
        assert source.is_exhausted()
        assert source.total == len(candidates)
        candidates = candidates[::2]
    elif search == "tuning":
        # The run as configured is tried first.
        first = made.apply_point({})
        seen = {made.identify_point({})}
        spread = spread_points(made, count - 1, 0, seen)
        candidates = [first, *map(made.apply_point, spread)]
        listed = {made.identify_point(each) for each in made.random_points(99, 0)}
        size = len(listed | seen)
    else:
        points = made.grid_points() if search == "grid" else made.random_points(count, 0)
        candidates = [
            each.config for each in configurations_from_points(made, points, lambda config: config)
        ]
    texts = {json.dumps(configuration.to_dict(each), sort_keys=True) for each in candidates}
    assert len(texts) == len(candidates), "a run is trained twice"
    assert len(texts) == (size if search == "grid" else min(count, size))
    assert made.count_distinct(1000) == SMALL_SPACES[name][1]


def end_trial(source: OptunaSource, trial: Trial) -> None:
    score = 1 / (1 + trial.config.model.num_layers)
    assert trial.group is not None
    report = {"step": 1, "score": score, "scores": {}}
    source.record_outcome(
        TrialOutcome(trial.name, trial.group, Path(), "finished", {"step": 1}, [report])
    )


def test_a_huge_space_is_not_listed() -> None:
    huge = space({"model.ffn_dim": {"log_integer": [1, 2**24]}, "seeded": {"options": {
        "a": {"training.lr": 1e-4}, "b": {"training.lr": 1e-3}}}})  # fmt: skip
    assert huge.count_distinct(50) == 50
    assert len(list(huge.random_points(50, 0))) == 50


@pytest.mark.parametrize(("search", "samples"), [("random", 8), ("optuna", 8), ("grid", 8)])
def test_a_sweep_says_that_its_space_is_small(search, samples, tmp_path, capsys):
    values = {"model.skill_every": [1, 2], "training.weight_decay": [0, 0.0, 0.1]}
    config = SweepConfig(
        name="small",
        space={key: SearchDimension(choice=each) for key, each in values.items()},
        search=search,
        samples=samples,
    )
    (tmp_path / "small" / "trials").mkdir(parents=True)
    source, _ = _build_source(config, tmp_path / "small")
    total = len(source) if isinstance(source, list) else source.total
    assert total == 4
    wanted = 6 if search == "grid" else samples
    shown = " ".join(capsys.readouterr().err.split())
    assert f"space: it has 4 distinct configurations, fewer than the {wanted} that" in shown
    _build_source(replace(config, samples=4, search="random"), tmp_path / "small")
    assert capsys.readouterr().err == ""
