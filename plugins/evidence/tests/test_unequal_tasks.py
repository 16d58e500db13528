"""Systems with unequal tasks: differences of differences, shared means, equivalence."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from plugins.evidence.tests.drawn_runs import TASKS, compared, draw_run
from skillnet_evidence import claims as cl
from skillnet_evidence.__main__ import read_claims
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import MEAN, SHARED_MEAN, SystemComparison, compare_systems
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.rows import build_claim_rows, build_summary_rows, group_claims
from skillnet_evidence.scale import build_scale_table, collect_scale, draw_scale_figure
from skillnet_evidence.scores import RunFold
from skillnet_evidence.tables import build_claim_table, build_tables

#: Two systems at two numbers of joint tasks, as (tasks, skill); dense loses most by more tasks.
SCALE = {
    "skills-2": (TASKS[:2], 0.3),
    "dense-2": (TASKS[:2], 0.4),
    "skills-5": (TASKS, 0.2),
    "dense-5": (TASKS, -0.3),
}
LEAD = Condition("skills-5", "dense-5", tasks=[MEAN], beyond=["skills-2", "dense-2"])


def draw_scale(numbers: Sequence[int], folds: bool = False) -> SystemComparison:
    """Compare the systems of ``SCALE``; each number is a fold, or a seed."""
    runs = []
    for label, (tasks, skill) in SCALE.items():
        for number in numbers:
            more = {"fold": RunFold(number, 0.25)} if folds else {}
            seed = 0 if folds else number
            runs.append(draw_run(label, seed, skill, tasks=tasks, draw=f"{label}{number}", **more))
    return compare_systems(runs, "skills-5")


def evaluate(of: SystemComparison, *parts: Condition, **more: float) -> cl.ClaimResult:
    stated = ClaimsConfig({"it": Claim("It is so.", list(parts))}, **more)
    return cl.evaluate_claims(of, stated)[0]


def test_a_difference_of_differences_is_that_of_each_replicate_by_hand() -> None:
    of = draw_scale(range(6), folds=True)
    claim = evaluate(of, LEAD)
    change = claim.conditions[0].change
    by_fold = []
    for number in range(6):
        means = {}
        for label in SCALE:
            (run,) = [each for each in of.systems[label] if each.fold.number == number]
            text, speech = (run.outcomes[task, "test"].value for task in TASKS[:2])
            means[label] = (text + 1 - speech) / 2
        by_fold.append(means["skills-5"] - means["dense-5"] - means["skills-2"] + means["dense-2"])
    assert change.value == pytest.approx(np.mean(by_fold))
    # Nadeau and Bengio: the variance of one replicate times 1/J + test/train.
    error = (np.var(by_fold, ddof=1) * (1 / 6 + 0.25)) ** 0.5
    assert (change.std_error, change.dof) == (pytest.approx(error), 5)
    assert claim.p == pytest.approx(stats.t.sf(change.value / error, 5))
    assert claim.conditions[0].by_fold == pytest.approx(by_fold)
    # The figure has a dot per fold.
    (group,) = group_claims(build_claim_rows([claim]))
    assert group.rows[0].by_fold == pytest.approx(by_fold)


def test_only_folds_that_all_four_systems_have_count() -> None:
    of = draw_scale(range(6), folds=True)
    runs = [each for each in of.runs if (each.label, each.fold.number) != ("dense-2", 5)]
    claim = evaluate(compare_systems(runs, "skills-5"), LEAD)
    assert len(claim.conditions[0].by_fold) == 5
    assert claim.conditions[0].change.dof == 4


def test_the_difficulty_of_units_cancels_in_a_difference_of_differences() -> None:
    of = draw_scale(range(4))
    claim = evaluate(of, LEAD)
    assert claim.verdict == "holds"
    change = claim.conditions[0].change
    scores = {label: of.scores[label, MEAN, "test"] for label in SCALE}
    lead, before = (scores[f"skills-{n}"].value - scores[f"dense-{n}"].value for n in (5, 2))
    assert change.value == pytest.approx(lead - before)
    # As independent scores, hard and easy units would count four times.
    assert change.std_error < 0.7 * sum(each.std_error**2 for each in scores.values()) ** 0.5
    # Four systems vary over seeds, not two.
    spread = of.spreads[MEAN, "test"]
    assert change.std_error > (4 * spread.variance / 4) ** 0.5
    reverse = Condition("skills-2", "dense-2", tasks=[MEAN], beyond=["skills-5", "dense-5"])
    assert evaluate(of, reverse).verdict == "does not hold"


def test_a_difference_of_equal_differences_covers_zero() -> None:
    labels = ("one", "other", "third", "fourth")
    part = Condition("one", "other", tasks=["text_classification"], beyond=["third", "fourth"])
    wrong, trials = 0, 150
    for trial in range(trials):
        runs = [
            draw_run(x, seed, tasks=TASKS[:1], rows=60, draw=f"{trial}{x}")
            for x in labels
            for seed in range(4)
        ]
        claim = evaluate(compare_systems(runs, "one"), part)
        wrong += claim.conditions[0].shown is not None
    assert wrong / trials <= 0.05 + 3 * (0.05 * 0.95 / trials) ** 0.5


def test_a_difference_of_differences_needs_four_systems() -> None:
    for beyond in (["c"], ["c", "b"], ["c", "c"], ["c", "d", "e"]):
        with pytest.raises(EvidenceError, match="needs four different systems; name two others"):
            Condition("a", "b", beyond=beyond)
    rules = ClaimsConfig({"it": Claim("x", [LEAD])})
    with pytest.raises(EvidenceError, match=r"claims.stated.it: unknown system 'dense-2'"):
        rules.check_names(["skills-5", "dense-5", "skills-2"], TASKS)
    claim = evaluate(compared({"skills-5": 0.1, "dense-5": 0.0}, reference="dense-5"), LEAD)
    assert claim.undecided_reason == "skills-2 and dense-2 not run"


def test_a_shared_mean_is_over_the_tasks_of_the_systems_of_its_part() -> None:
    of = draw_scale(range(4))
    means = [
        Condition("skills-5", "dense-5", tasks=[MEAN]),
        Condition("skills-5", "dense-5", tasks=[SHARED_MEAN], flops_at_most=1.0),
        Condition("skills-5", "dense-2", tasks=[SHARED_MEAN]),
    ]
    claim = evaluate(of, *means)
    common, shared, costs, across = claim.conditions
    assert [each.score for each in (common, shared, across)] == [
        "mean of 2 tasks",
        "mean of 5 tasks",
        "mean of 2 tasks",
    ]
    for found, count in ((common, 2), (shared, 5)):
        wanted = [
            of.scores["skills-5", task, "test"].value - of.scores["dense-5", task, "test"].value
            for task in TASKS[:count]
        ]
        assert found.change.value == pytest.approx(np.mean(wanted))
    # Costs are those of the same tasks.
    assert costs.text == "1.00 of the FLOPs of dense-5, at most 1, mean of 5 tasks"
    # No sentence, row or table has two means under one word.
    texts = [each.text for each in claim.conditions] + [claim.rule]
    texts += [cell.text for row in build_claim_table([claim], of).rows for cell in row]
    texts += [row.label for group in group_claims(build_claim_rows([claim])) for row in group.rows]
    texts.append(cl.answer_comparison(of, [claim]))
    assert not [text for text in texts if re.search(r"\bmean\b(?! of \d tasks| over )", text)]


def test_equal_tasks_have_one_mean() -> None:
    of = compared({"skillnet": 0.3, "dense": 0.0})
    both = evaluate(of, Condition("skillnet", "dense", tasks=[MEAN, SHARED_MEAN]))
    assert [each.score for each in both.conditions] == ["mean", "mean"]
    assert both.conditions[0].change == both.conditions[1].change


def test_claims_about_unequal_tasks_are_read_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(
        "stated:\n  it:\n    text: It grows.\n    parts:\n"
        "      - {system: skills-5, against: dense-5, beyond: [skills-2, dense-2], tasks: [mean]}\n"
        "      - {system: skills-5, against: skills-2, test: equivalent, tasks: [shared_mean]}\n"
    )
    rules = read_claims(path)
    assert rules.stated["it"].parts == [
        LEAD,
        Condition("skills-5", "skills-2", "equivalent", [SHARED_MEAN]),
    ]
    rules.check_names(list(SCALE), TASKS)
    path.write_text("stated: {it: {text: x, parts: [{system: a, against: b, beyond: [c]}]}}")
    with pytest.raises(EvidenceError, match=r"\(a − b\) − \(c\) needs four different systems"):
        read_claims(path)


# -- equivalence ---------------------------------------------------------------------------


@pytest.mark.parametrize("systems", [("skillnet", "dense"), ("dense", "skillnet")])
def test_equivalence_bounds_a_gain_and_a_loss(systems: tuple[str, str]) -> None:
    of = compared({"skillnet": 0.05, "dense": 0.0}, rows=4000, by_seed=0.001)
    part = Condition(*systems, "equivalent", [MEAN])
    change = cl.estimate_difference(of, *systems, MEAN)
    far, near = abs(change.value) + (change.high - change.low) / 2, abs(change.value)
    for margin, verdict in (
        (far + 0.001, "holds"),
        (near, "not decided"),
        (2 * near - far - 0.001, "does not hold"),
    ):
        claim = evaluate(of, part, margin=margin)
        assert claim.verdict == verdict
        worst = max(-change.value - margin, change.value - margin) / change.std_error
        assert claim.p == pytest.approx(stats.t.cdf(worst, change.dof))
        (condition,) = claim.conditions
        slack = margin - abs(change.value) - (change.high - change.value)
        assert condition.slack == pytest.approx(slack)
    assert (
        "interval lies within ±1 points, and refutes outside ±1"
        in evaluate(of, part, margin=0.01).rule
    )
    (group,) = group_claims(build_claim_rows([claim]))
    assert group.rows[0].band == (-margin, margin)


def test_equivalence_needs_a_margin() -> None:
    with pytest.raises(EvidenceError, match=r"stated\.it: the margin of test"):
        ClaimsConfig({"it": Claim("x", [Condition("a", "b", "equivalent")])}, margin=0.0)


# -- all claims together -------------------------------------------------------------------


def test_claims_are_corrected_as_one_family_and_a_conjunction_counts_its_largest_p() -> None:
    of = compared({"skillnet": 0.12, "dense": 0.0}, rows=400)
    mean, *tasks = (Condition("skillnet", "dense", tasks=[task]) for task in (MEAN, *TASKS))
    stated = {"mean": Claim("Mean.", [mean]), "both": Claim("Both.", [mean, tasks[4]])}
    stated["all"] = Claim("All.", tasks)
    found = cl.evaluate_claims(of, ClaimsConfig(stated, alpha=0.9))
    p = [claim.p for claim in found]
    assert p == [max(each.p for each in claim.conditions) for claim in found]
    assert p[0] < p[1] < p[2]
    assert len({each.p for each in found[1].conditions}) == 2
    # Holm: the smallest p counts three times, the next one twice.
    for level, held in ((0.9 * 3 * p[0], 0), (1.05 * 3 * p[0], 1), (1.05 * 2 * p[1], 2)):
        claims = cl.evaluate_claims(of, ClaimsConfig(stated, alpha=2 * level))
        assert [claim.verdict for claim in claims[:2]] == ["holds"] * held + ["not decided"] * (
            2 - held
        )
        assert all(claim.is_tested for claim in claims)


def test_the_headline_says_what_was_not_tested() -> None:
    """The page said "0 of 5 claims hold", and hid that four of them were never tested."""
    of = compared({"skillnet": 0.0, "dense": 0.0, "moe": -0.9})
    parts = [
        Condition("skillnet", "dense", tasks=[MEAN]),
        Condition("skillnet", "moe", tasks=[MEAN]),
        Condition("moe", "skillnet", tasks=[MEAN]),
        Condition("skillnet", "alone", tasks=[MEAN]),
    ]
    stated = {f"{n}": Claim(f"Claim {n}.", [part]) for n, part in enumerate(parts)}
    chain = cl.evaluate_claims(of, ClaimsConfig(stated, list(stated)))
    answer = cl.answer_comparison(of, chain)
    assert answer.startswith("Not decided: Claim 0; ")
    assert answer.endswith("; other claims: 3 not tested.")
    family = cl.evaluate_claims(of, ClaimsConfig(stated))
    assert cl.answer_comparison(of, family).endswith(
        "; other claims: 1 shown, 1 refuted, 1 not tested."
    )


# -- score and cost against the number of tasks --------------------------------------------


def test_systems_whose_names_differ_in_a_number_are_a_series() -> None:
    of = draw_scale(range(4))
    points = collect_scale(build_summary_rows(of))
    assert [(each.series, each.label, each.tasks) for each in points] == [
        ("skills", "skills-2", 2),
        ("skills", "skills-5", 5),
        ("dense", "dense-2", 2),
        ("dense", "dense-5", 5),
    ]
    for point in points:
        scores = [of.scores[point.label, task, "test"].value for task in TASKS[: point.tasks]]
        assert point.own[0] == pytest.approx(100 * np.mean(scores))
        assert point.common[0] == pytest.approx(100 * np.mean(scores[:2]))
        assert point.own[1] < point.own[0] < point.own[2]
        # Costs are of the tasks that all have: 100,000 and 200,000 operations.
        assert point.flops == 150_000
    table = build_scale_table(points)
    assert table.columns[2:4] == ["mean of 2 tasks", "mean of all its tasks"]
    assert [row[1].text for row in table.rows] == ["2", "5", "2", "5"]
    panels = draw_scale_figure(points).axes
    assert [panel.get_title(loc="left") for panel in panels[:2]] == [
        "Mean score of the 2 tasks that all have, percent",
        "Mean score of all tasks of a system, percent",
    ]
    # A line per series and panel, with a marker per number of tasks.
    lines = panels[0].containers
    assert [len(each.lines[0].get_xdata()) for each in lines] == [2, 2]
    assert [each.has_yerr for panel in panels for each in panel.containers] == 4 * [True] + 4 * [
        False
    ]
    # A system without an interval hides none of the others.
    points[0] = points[0]._replace(common=(points[0].common[0], math.nan, math.nan))
    assert draw_scale_figure(points).axes[0].containers[0].has_yerr


def test_equal_tasks_make_no_series() -> None:
    of = compared({"skillnet-1": 0.0, "skillnet-2": 0.0}, reference="skillnet-1")
    points = collect_scale(build_summary_rows(of))
    assert points == []
    assert build_scale_table(points).rows == []


def test_no_table_of_unequal_tasks_has_a_nameless_mean() -> None:
    of = draw_scale(range(4))
    texts = [text for table in build_tables(of) for text in table.columns]
    texts += [row[0].text for table in build_tables(of) for row in table.rows]
    texts += [row[2].text for table in build_tables(of)[-1:] for row in table.rows]
    assert "mean of 2 tasks" in texts
    assert not {"mean", "mean score", "shared mean", "own mean"} & set(texts)
    assert cl.answer_comparison(of, []).startswith(
        "dense-2 has the highest mean of 2 tasks of 4 systems, "
    )
