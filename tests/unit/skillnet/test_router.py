"""The router of inputs without a task: sums of counts, domains, confidence and doubt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from skillnet import router
from skillnet.model import SkillNet
from skillnet.router import InputCounts, InputRouter
from skillnet.skills import SkillPlan
from tests.helpers.readable_corpora import config

WORDS = 40


def draw_rows(domain: int, rows: int, seed: int, shared: float = 0.3) -> np.ndarray:
    """Rows of 12 tokens: most of them words of the domain, the others of all domains."""
    draw = np.random.default_rng([domain, seed])
    own = 10 + WORDS * (1 + domain) + draw.integers(WORDS, size=(rows, 12))
    return np.where(draw.random(own.shape) < shared, 10 + draw.integers(WORDS, size=own.shape), own)


def count(domain: int, seed: int = 0) -> InputCounts:
    return router.count_features(
        [router.hash_tokens(draw_rows(domain, 100, seed))],
        [router.hash_tokens(draw_rows(domain, 60, seed + 1))],
    )


def ask(found: InputRouter, rows: np.ndarray) -> list[router.RoutedInput]:
    return [found.route(row) for row in router.hash_tokens(rows)]


def test_a_router_names_the_domain_of_held_out_rows_and_grows_by_sums_alone() -> None:
    counts = {f"task_{n}": count(n) for n in range(5)}
    together = InputRouter(counts)
    for number in range(5):
        answers = [each.tasks for each in ask(together, draw_rows(number, 40, seed=7))]
        assert set(answers) - {()} == {(f"task_{number}",)}
        assert answers.count(()) <= 4
    # In another order, and after a task came and went: the same bits.
    grown = InputRouter(dict(reversed(counts.items())))
    rows = np.concatenate([draw_rows(n, 5, seed=8, shared=0.9) for n in range(6)])
    assert ask(grown, rows) == ask(together, rows)
    more = InputRouter(counts | {"other": count(6)})
    assert ask(more, draw_rows(6, 1, seed=9))[0].tasks == ("other",)
    assert ask(InputRouter({k: counts[k] for k in counts}), rows) == ask(together, rows)


def test_tasks_whose_rows_look_alike_answer_together() -> None:
    counts = {"stroke_count": count(1), "radical": count(1, seed=4), "heading": count(2)}
    found = InputRouter(counts)
    assert found.domains == [("heading",), ("radical", "stroke_count")]
    assert ask(found, draw_rows(1, 1, seed=9))[0].tasks == ("radical", "stroke_count")
    # Without another domain, nothing is asked, not even whether the input is a usual one.
    alone = InputRouter({name: counts[name] for name in ("stroke_count", "radical")})
    assert ask(alone, draw_rows(7, 1, seed=9))[0] == router.RoutedInput(alone.domains[0], 1.0)


@pytest.mark.parametrize(
    ("rows", "doubt"),
    [
        (np.full((1, 12), 17), "unsure between "),
        (draw_rows(7, 1, seed=9, shared=0.0), "unlike the inputs of all tasks, nearest to "),
    ],
    ids=["words of all domains", "foreign"],
)
def test_a_router_says_that_it_is_unsure(rows: np.ndarray, doubt: str) -> None:
    # Mixed rows of these domains are among those that calibrate.
    counts = {}
    for number in range(3):
        kept = [draw_rows(number, 40, 1), draw_rows(number, 40, 2, shared=0.97)]
        trained = np.concatenate([draw_rows(number, 100, 3), draw_rows(number, 50, 4, 0.97)])
        counts[f"task_{number}"] = router.count_features(
            [router.hash_tokens(trained)], [router.hash_tokens(each) for each in kept]
        )
    (found,) = ask(InputRouter(counts), rows)
    assert found.tasks == ()
    assert found.doubt.startswith(doubt)
    assert found.doubt.endswith("; name the task")
    assert 0 < found.confidence <= 1


def test_a_router_without_rows_that_calibrate_is_never_sure() -> None:
    counts = {
        name: InputCounts(count(n).counts, np.zeros((0, 0), int)) for n, name in enumerate("ab")
    }
    # Without rows nothing tells the domains apart.
    assert InputRouter(counts).domains == [("a", "b")]
    mixed = InputRouter({"a": count(0), "b": count(1), "c": counts["a"]})
    assert ask(mixed, draw_rows(9, 1, seed=9, shared=1.0))[0].tasks == ()


@pytest.mark.parametrize("modality", ["text", "image", "sound", "video"])
def test_features_of_a_row_do_not_depend_on_its_batch(modality: str) -> None:
    from skillnet.modality import find_modality

    torch.manual_seed(0)
    model = SkillNet(config())
    plan = SkillPlan(("general",), modality)
    half = find_modality(modality).tensor_half
    batch = half.make_example(model.config, 4, None, torch.Generator().manual_seed(1))
    together = router.find_buckets(model, plan, batch)
    assert together is not None
    assert len({tuple(row) for row in together.tolist()}) == 4
    for number in range(4):
        alone = router.find_buckets(
            model, plan, {name: x[number : number + 1] for name, x in batch.items()}
        )
        assert alone is not None
        assert (alone == together[number]).all()


def test_counts_of_a_file_are_checked(tmp_path: Path) -> None:
    path = tmp_path / router.name_counts("a")
    made = count(1)
    made.save(path)
    found = router.load_counts(path)
    assert (found.counts == made.counts).all()
    assert (found.rows == made.rows).all()
    good = {"counts": made.counts.astype("f4"), "rows": made.rows.astype("f4")}
    for wrong in (
        {"counts": good["counts"]},
        good | {"counts": -good["counts"]},
        good | {"counts": good["counts"][:9]},
        good | {"rows": good["rows"] + 2**14},
        good | {"rows": good["rows"] - 2**14},
        good | {"rows": good["rows"] + 0.5},
        good | {"rows": good["rows"][0]},
    ):
        save_file(wrong, path)
        with pytest.raises(ValueError, match=r"inputs-a\.safetensors holds no counts"):
            router.load_counts(path)
