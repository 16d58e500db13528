"""Comparison of finished runs, and the verdicts of claims."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from plugins.evidence.tests.drawn_runs import TASKS, compared, draw_run
from skillnet_evidence import claims as cl
from skillnet_evidence.__main__ import read_claims
from skillnet_evidence.claims import Claim, ClaimsConfig, Condition
from skillnet_evidence.comparison import MEAN, SystemComparison, compare_systems
from skillnet_evidence.errors import EvidenceError
from skillnet_evidence.rows import build_claim_rows, build_test_rows, group_claims, group_tests
from skillnet_evidence.statistics import compute_p_value
from skillnet_evidence.tables import build_claim_table, build_score_table, build_tables

PAPER = Path(__file__).parents[3] / "configs" / "claims" / "paper.yaml"


@pytest.fixture(scope="module")
def clear() -> SystemComparison:
    """Build a comparison where SkillNet leads, more so if pretrained, and dense is last."""
    systems = {
        "skillnet": 0.6,
        "skillnet-pretrained": 1.4,
        "specialist": 0.0,
        "specialist-pretrained": 0.5,
        "dense": -0.3,
        "moe": -0.2,
    }
    return compared(systems)


def verdicts(of: SystemComparison, config: ClaimsConfig) -> dict[str, str]:
    return {claim.name: claim.verdict for claim in cl.evaluate_claims(of, config)}


def one_claim(**part: object) -> ClaimsConfig:
    """Return the configuration of a claim about skillnet and specialist."""
    stated = Condition("skillnet", "specialist", **part)
    return ClaimsConfig({"it": Claim("It is so.", [stated])})


def test_estimates_are_means_over_the_seeds_of_the_runs(clear: SystemComparison):
    for label, runs in clear.systems.items():
        for task in TASKS:
            values = [run.outcomes[task, "test"].value for run in runs]
            wanted = 1 - np.mean(values) if task == "speech_recognition" else np.mean(values)
            found = clear.scores[label, task, "test"]
            assert found.value == pytest.approx(wanted)
            assert found.low < found.value < found.high
        mean = np.mean([clear.scores[label, task, "test"].value for task in TASKS])
        assert clear.scores[label, MEAN, "test"].value == pytest.approx(mean)


def test_relative_scores_use_specialists_of_the_same_pretraining(clear: SystemComparison):
    own = clear.relative["specialist"].value
    assert own.value == 1
    assert np.isnan([own.low, own.high]).all()
    assert clear.relative["skillnet"].against == "specialist"
    assert clear.relative["skillnet-pretrained"].against == "specialist-pretrained"
    ratios = [
        clear.scores["skillnet", task, "test"].value
        / clear.scores["specialist", task, "test"].value
        for task in TASKS
    ]
    found = clear.relative["skillnet"].value
    assert found.value == pytest.approx(np.prod(ratios) ** (1 / len(TASKS)))
    assert 1 < found.low < found.value < found.high
    without = [np.prod([*ratios[:i], *ratios[i + 1 :]]) ** 0.25 for i in range(len(TASKS))]
    assert clear.relative["skillnet"].without_one == pytest.approx((min(without), max(without)))


def test_tests_cover_each_system_once_and_are_corrected_together(clear: SystemComparison):
    pairs = {(t.kind, t.system, t.against) for t in clear.tests}
    assert pairs == {
        ("system", "specialist", "skillnet"),
        ("system", "specialist-pretrained", "skillnet-pretrained"),
        ("system", "dense", "skillnet"),
        ("system", "moe", "skillnet"),
        ("pretraining", "skillnet-pretrained", "skillnet"),
        ("pretraining", "specialist-pretrained", "specialist"),
    }
    assert len(clear.tests) == len(pairs) * (len(TASKS) + 1)
    assert all(test.p_corrected >= test.p for test in clear.tests)
    smallest = min(clear.tests, key=lambda test: test.p)
    assert smallest.p_corrected == pytest.approx(min(1, len(clear.tests) * smallest.p))
    dense = clear.find_test("dense", "skillnet", MEAN)
    assert dense.verdict == "lower"
    assert dense.difference.high < 0


def test_the_claims_of_the_paper_hold_with_a_large_difference(clear: SystemComparison):
    found = cl.evaluate_claims(clear, read_claims(PAPER))
    assert [(claim.name, claim.verdict) for claim in found] == [
        ("pretrained specialists", "holds"),
        ("specialists", "holds"),
        ("pretraining", "holds"),
        ("mixture of experts", "not decided"),
    ]
    assert found[-1].undecided_reason == "moe-pretrained not run"
    assert len(found[0].conditions) == len(TASKS)
    assert "a gain of at least" in found[0].conditions[0].text
    assert "on each task: the 95 % interval lies above −2 points" in found[0].rule


def test_a_clear_loss_refutes_and_closes_the_gate():
    lost = {"text_to_image": -0.9, "text_to_code": 0.4}
    systems = {"skillnet": lost, "specialist": 0.0, "dense": 0.6, "moe": 0.9}
    found = compared(systems)
    parts = {
        "specialists": [Condition("skillnet", "specialist", "not_lower")],
        "dense": [Condition("dense", "skillnet", tasks=[MEAN])],
        "moe": [Condition("moe", "skillnet", tasks=[MEAN])],
    }
    # The study states them in another order than it tests them.
    stated = {name: Claim(f"{name}.", parts[name]) for name in reversed(parts)}
    rules = ClaimsConfig(stated, order=["specialists", "dense"])
    claims = {claim.name: claim for claim in cl.evaluate_claims(found, rules)}
    assert list(claims) == ["specialists", "dense", "moe"]
    assert claims["specialists"].verdict == "does not hold"
    image = claims["specialists"].conditions[TASKS.index("text_to_image")]
    assert image.shown is False
    assert "a loss of at least" in image.text
    # It would be shown by itself, but it is tested after a claim that is not.
    assert claims["dense"].verdict == "not decided"
    assert claims["dense"].undecided_reason == (
        "it is tested after 'specialists', which is not shown"
    )
    assert all(condition.shown for condition in claims["dense"].conditions)
    assert claims["moe"].verdict == "holds"
    # The answer has the score that refutes, and not the one whose interval is widest.
    refuted = [each for each in claims["specialists"].conditions if each.shown is False]
    closest = claims["specialists"].find_closest()
    assert closest in refuted
    answer = cl.answer_comparison(found, list(claims.values()))
    assert answer.startswith("Refuted: specialists; least favourable of 5 scores: text to image")


def test_equal_systems_can_be_shown_to_be_no_worse():
    """Equal systems reached "holds" with probability 0: comparability was asked to beat."""
    systems = {"skillnet": 0.0, "specialist": 0.0}
    found = compared(systems, rows=2000, by_seed=0.0)
    narrow = one_claim(test="not_lower")
    narrow.margin = 0.0005
    assert verdicts(found, narrow) == {"it": "not decided"}
    wide = one_claim(test="not_lower")
    wide.margin = 0.05
    assert verdicts(found, wide) == {"it": "holds"}
    wide.margins = {"text_to_code": 0.0001}
    (claim,) = cl.evaluate_claims(found, wide)
    assert claim.verdict == "not decided"
    (open_one,) = [each for each in claim.conditions if each.shown is None]
    assert re.fullmatch(
        r"text to code, skillnet − specialist: .* points \(.*\); no loss above \d\.\d points, "
        r"no gain above \d\.\d",
        open_one.text,
    )
    assert "(text_to_code −0.01)" in claim.rule
    # The answer and the table say what is excluded, too.
    pattern = r"no loss above \d\.\d points, no gain above \d\.\d"
    assert re.search(rf"{pattern}\.$", cl.answer_comparison(found, [claim]))
    assert re.search(pattern, build_claim_table([claim], found).rows[0][-1].text)


def test_a_small_loss_within_the_margin_does_not_refute():
    """A significant loss of one point does not refute a claim about a loss of three."""
    found = compared({"skillnet": -0.05, "specialist": 0.0}, rows=4000, by_seed=0.001)
    rules = one_claim(test="not_lower", tasks=[MEAN])
    rules.margin = 0.06
    assert cl.estimate_difference(found, "skillnet", "specialist", MEAN).high < 0
    assert verdicts(found, rules) == {"it": "holds"}
    assert verdicts(found, one_claim(tasks=[MEAN])) == {"it": "does not hold"}


def test_claims_without_an_order_are_corrected_together_and_conjunctions_are_not():
    found = compared({"skillnet": 0.04, "specialist": 0.0, "dense": 0.0})
    change = cl.estimate_difference(found, "skillnet", "specialist", MEAN)
    p = compute_p_value(*found.subtract_scores("skillnet", "specialist", MEAN))
    assert change.low > 0
    part = Condition("skillnet", "specialist", tasks=[MEAN])
    # The same part ten times is one conjunction at the same level.
    assert verdicts(found, ClaimsConfig({"it": Claim("x", [part] * 10)})) == {"it": "holds"}
    count = int(0.05 / p) + 1
    many = ClaimsConfig({f"{n}": Claim("x", [part]) for n in range(count)})
    claims = cl.evaluate_claims(found, many)
    assert {claim.verdict for claim in claims} == {"not decided"}
    assert claims[0].undecided_reason.startswith(f"shown alone, but not among {count} claims")
    many.order = list(many.stated)
    assert set(verdicts(found, many).values()) == {"holds"}


def test_a_comparison_of_two_systems_answers_in_a_sentence():
    ahead = compared({"dense": 0.0, "skillnet": 0.8})
    assert re.fullmatch(
        r"skillnet scores higher than dense on 5 tasks: \+\d+\.\d points \(\+.* to \+.*\)\.",
        cl.answer_in_a_sentence(ahead),
    )
    level = compared({"skillnet": 0.0, "dense": 0.0})
    text = cl.answer_in_a_sentence(level)
    assert re.match(r"Not decided: skillnet − dense is .* points \(.*\) on 5 tasks; no loss", text)
    assert "no loss above" in text


def test_a_claim_about_operations_needs_no_test(clear: SystemComparison):
    assert verdicts(clear, one_claim(flops_at_most=1.0)) == {"it": "holds"}
    (claim,) = cl.evaluate_claims(clear, one_claim(flops_at_most=0.5))
    assert claim.verdict == "does not hold"
    assert claim.conditions[-1].text == "1.00 of the FLOPs of specialist, at most 0.5"
    # Costs alone refute it, so no score stands in the answer.
    answer = cl.answer_comparison(clear, [claim])
    assert answer.endswith("; 1.00 of the FLOPs of specialist, at most 0.5.")
    assert "least favourable" not in answer
    # The table keeps the score of a claim with one.
    (claim,) = cl.evaluate_claims(clear, one_claim(tasks=[MEAN], flops_at_most=0.5))
    result = build_claim_table([claim], clear).rows[0][-1].text
    assert re.match(r"mean \+\d+\.\d.*; 1\.00 of the FLOPs of specialist", result)


def test_names_in_claims_are_checked_before_a_study_starts() -> None:
    rules = one_claim(tasks=["text_to_image"])
    rules.check_names(["skillnet", "specialist"], TASKS)
    with pytest.raises(EvidenceError, match=r"claims.stated.it: unknown system 'specialist'"):
        rules.check_names(["skillnet", "specialists"], TASKS)
    with pytest.raises(EvidenceError, match=r"claims.stated.it: unknown task 'text_to_image'"):
        rules.check_names(["skillnet", "specialist"], TASKS[:2])
    with pytest.raises(EvidenceError, match=r"order: unknown claim 'its'; did you mean 'it'"):
        ClaimsConfig(rules.stated, order=["its"])
    with pytest.raises(EvidenceError, match="compared with itself"):
        Condition("skillnet", "skillnet")
    with pytest.raises(EvidenceError, match="has no parts"):
        Claim("x", [])


def test_a_specialist_with_score_zero_leaves_the_relative_score_unknown():
    found = compared({"skillnet": 0.5, "specialist": {"text_to_code": -50.0}})
    assert np.isnan(found.relative["skillnet"].value.value)
    rows = build_score_table(found).rows
    assert [row[-1].text for row in rows] == ["–", "1"]
    assert "nan" not in "".join(
        cell.text for table in build_tables(found) for r in table.rows for cell in r
    )


def test_a_missing_task_keeps_the_others():
    skills = {"skillnet": 0.5, "specialist": 0.0}
    runs = [draw_run(label, seed, x) for label, x in skills.items() for seed in range(3)]
    few = [draw_run("dense", seed, tasks=TASKS[:2]) for seed in range(3)]
    found = compare_systems([*few, *runs], first_tasks=TASKS)
    assert list(found.tasks) == list(TASKS)
    assert list(found.common_tasks) == list(TASKS[:2])
    assert found.find_score("dense", "text_to_image") is None
    assert found.find_test("dense", "skillnet", "text_to_image") is None
    with pytest.raises(EvidenceError, match="no task in common"):
        compare_systems([few[0], draw_run("moe", tasks=TASKS[3:])])


def test_one_seed_and_one_system_give_a_table():
    found = compared({"skillnet": 0.0}, seeds=(3,))
    assert found.seeds == 1
    assert not found.tests
    assert found.scores["skillnet", MEAN, "test"].low > 0
    assert set(verdicts(found, read_claims(PAPER)).values()) == {"not decided"}
    with pytest.raises(EvidenceError, match="no finished runs"):
        compare_systems([])


def test_a_mean_score_lies_within_its_interval():
    """A token error far above 1 gave a mean of -29.7 with the interval 0.0 to 0.0."""
    runs = [draw_run("skillnet", seed) for seed in range(3)]
    for run in runs:
        wrong = run.outcomes["speech_recognition", "test"]
        wrong.numerator[:] = 150 * wrong.denominator
    found = compare_systems(runs)
    for score in found.scores.values():
        assert 0 <= score.low <= score.value <= score.high <= 1
        assert score.low < score.high
    speech = found.scores["skillnet", "speech_recognition", "test"]
    assert (speech.value, found.metrics["speech_recognition"].score(150.0)) == (0, 0)
    assert found.scores["skillnet", MEAN, "test"].value > 0.4


# -- one verdict in every place ------------------------------------------------------------


def draw_comparison(place: int) -> SystemComparison:
    """Compare a random study: 1 to 5 seeds and tasks, 2 to 4 systems, some far apart."""
    random = np.random.default_rng([7, place])
    labels = ["skillnet", *random.choice(["dense", "moe", "specialist"], 3, replace=False)]
    tasks, most = TASKS[: random.integers(1, 6)], int(random.integers(1, 6))
    runs = []
    for label in map(str, labels[: random.integers(2, 5)]):
        skill = {task: float(random.normal(0, random.choice([0.02, 0.2]))) for task in tasks}
        # The systems of a report may differ in their number of seeds.
        for seed in range(max(1, most - int(random.integers(0, 2)))):
            runs.append(draw_run(label, seed, skill, tasks=tasks, rows=80))
    return compare_systems(runs)


def draw_claims(of: SystemComparison, place: int) -> ClaimsConfig:
    """Return one to three claims about systems of a comparison, some with an order."""
    random = np.random.default_rng([8, place])
    stated = {}
    for number in range(random.integers(1, 4)):
        own, other = map(str, random.choice(list(of.systems), 2, replace=False))
        tasks = [[], [MEAN], [of.common_tasks[0]]][random.integers(0, 3)]
        part = Condition(own, other, random.choice(["higher", "not_lower"]), tasks)
        stated[f"claim {number}"] = Claim(f"Claim {number}.", [part])
    return ClaimsConfig(stated, list(stated)[: random.integers(0, len(stated) + 1)])


@pytest.fixture(scope="module")
def drawn() -> list[SystemComparison]:
    return [draw_comparison(place) for place in range(40)]


def test_sentence_mark_figure_and_json_state_one_verdict(drawn: list[SystemComparison]):
    """One seed was "Not decided", ▼ and "refuted" in one report."""
    turned = {"higher": "lower", "lower": "higher", "not decided": "not decided"}
    marks = {"higher": "▲", "lower": "▼", "not decided": ""}
    seen = set()
    for of in drawn:
        table = {row[0].text: row[2:] for row in build_score_table(of).rows}
        rows = build_test_rows(of)
        groups = {group.title: group.rows for group in group_tests(rows)}
        answer = cl.answer_comparison(of, [])
        assert not any(cell.mark for cell in table["skillnet"])
        for label in [label for label in of.systems if label != "skillnet"]:
            own = {row["task"]: row for row in rows if row["system"] == label}
            # A mean over one task is the score of that task, and no second test.
            assert set(own) == {*of.tasks, *([MEAN] if len(of.tasks) > 1 else [])}
            own.setdefault(MEAN, own[of.tasks[0]])
            is_few = min(len(of.systems[each]) for each in (label, "skillnet")) < 3
            for task, cell in zip([*of.tasks, MEAN], table[label], strict=False):
                row = own[task]
                wanted = "higher" if row["difference"] > 0 else "lower"
                wanted = wanted if row["p_corrected"] <= 0.05 and not is_few else "not decided"
                assert row["verdict"] == wanted
                assert cell.mark == marks[wanted]
                seen.add(wanted)
            results = [each.result for each in groups[f"skillnet − {label}"]]
            assert results == [turned[row["verdict"]] for row in rows if row["system"] == label]
            verdict = turned[own[MEAN]["verdict"]]
            if len(of.systems) == 2:
                opening = f"skillnet scores {verdict} than {label} on "
                assert answer.startswith("Not decided: " if verdict == "not decided" else opening)
            elif answer.startswith("skillnet has the highest") and f" {label} (" in answer:
                assert answer.endswith(f"{label} (verdict: {verdict}).")
    assert seen == set(turned)


def test_a_claim_has_one_verdict_in_every_place(drawn: list[SystemComparison]):
    openings = {"holds": "Shown", "does not hold": "Refuted", "not decided": "Not decided"}
    seen = set()
    for place, of in enumerate(drawn):
        claims = cl.evaluate_claims(of, draw_claims(of, place))
        rows = build_claim_rows(claims)
        table = build_claim_table(claims, of).rows
        assert [cells[0].text for cells in table] == [row["verdict"] for row in rows]
        answer = cl.answer_comparison(of, claims)
        assert answer.startswith(openings[rows[0]["verdict"]] + ": ")
        for row, group, cells in zip(rows, group_claims(rows), table, strict=True):
            results = [each["result"] for each in row["conditions"]]
            assert [each.result for each in group.rows] == results
            assert group.note.startswith(row["verdict"])
            systems = [row["conditions"][0][key] for key in ("system", "against")]
            if min(len(of.systems[label]) for label in systems) < 3:
                assert row["undecided_reason"].endswith("a verdict requires at least 3")
            wanted = "does not hold" if "refuted" in results else "not decided"
            assert row["verdict"] == ("holds" if set(results) == {"shown"} else wanted)
            if row["undecided_reason"]:
                # Points of a claim that is not tested are hollow, and no table calls them shown.
                text = cells[-1].text.replace(row["undecided_reason"], "")
                assert set(results) == {"open"}
                assert "shown" not in text
                assert "refuted" not in text
            seen |= {row["verdict"], row["undecided_reason"].partition(" ")[0]}
    assert seen >= {*openings, "1", "2", "it", "shown", ""}


def test_two_systems_without_a_reference_have_no_verdict():
    """The sentence said "scores higher" where nothing was tested."""
    of = compared({"dense": 0.8, "moe": 0.0})
    answer = cl.answer_in_a_sentence(of)
    assert answer.startswith("Not decided: dense − moe is +")
    assert answer.endswith("; no system is named skillnet, so nothing is tested; give --reference.")
    named = cl.answer_in_a_sentence(compare_systems(of.runs, "moe"))
    assert named.startswith("moe scores lower than dense on 5 tasks: −")
    # Scores of a reserve are not tested.
    untested = cl.answer_in_a_sentence(replace(compare_systems(of.runs, "moe"), tests=[]))
    assert untested.endswith("; these systems are not tested against each other.")


def test_a_mean_over_one_task_is_not_a_second_test():
    systems = {"skillnet": 0.0, "dense": -0.2}
    of = compared(systems, tasks=TASKS[:1])
    (test,) = of.tests
    assert test.p_corrected == test.p
    assert of.find_test("dense", "skillnet", MEAN) == test
    turned = of.find_test("skillnet", "dense", MEAN)
    assert turned.difference.value == -test.difference.value
    assert turned.difference.low == -test.difference.high


def test_a_variant_as_reference_is_not_tested_against_itself():
    systems = {"skillnet": 0.0, "skillnet-pretrained": 0.4, "dense": 0.1}
    of = compared(systems, reference="skillnet-pretrained")
    pairs = [(each.system, each.against) for each in of.tests if each.task == MEAN]
    assert pairs == [("skillnet", "skillnet-pretrained"), ("dense", "skillnet-pretrained")]


# -- p-values of claims --------------------------------------------------------------------


@pytest.fixture(scope="module")
def near() -> SystemComparison:
    """Build a comparison of two systems that are close to each other."""
    return compared({"skillnet": 0.1, "dense": 0.0})


@pytest.mark.parametrize("test", ["higher", "not_lower"])
@pytest.mark.parametrize("margin", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("systems", [("skillnet", "dense"), ("dense", "skillnet")])
def test_the_p_of_a_claim_is_one_sided_and_counts_its_margin(test, margin, systems, near):
    of = near
    part = Condition(*systems, test=test, tasks=[MEAN])
    rules = ClaimsConfig({"it": Claim("It is so.", [part])}, margin=margin)
    (claim,) = cl.evaluate_claims(of, rules)
    change = cl.estimate_difference(of, *systems, MEAN)
    limit = margin if test == "not_lower" else 0.0
    wanted = stats.t.sf((change.value + limit) / change.std_error, change.dof)
    assert claim.p == pytest.approx(wanted)
    # The interval and the p-value agree: both test a side at half of the level.
    assert (claim.p < 0.025) == (claim.conditions[0].shown is True)
    assert (claim.p > 0.975) == (claim.conditions[0].shown is False)


def test_a_refuted_claim_does_not_weaken_the_correction_of_the_others():
    """With the p of a wrong sign halved, it came first and Holm's factor fell from 2 to 1."""
    of = compared({"skillnet": 0.3, "dense": 0.0, "moe": -0.5})
    lead = cl.estimate_difference(of, "skillnet", "dense", MEAN)
    claims = {
        "lead": [Condition("skillnet", "dense", "not_lower", [MEAN])],
        "wrong": [Condition("moe", "skillnet", tasks=[MEAN])],
    }
    stated = {name: Claim(f"{name}.", parts) for name, parts in claims.items()}
    p = stats.t.sf(lead.value / lead.std_error, lead.dof)
    # Shown alone, and not among two: the level lies between p and 2 p.
    for alpha, wanted in ((2 * 1.5 * p, "not decided"), (2 * 2.5 * p, "holds")):
        found = cl.evaluate_claims(of, ClaimsConfig(stated, alpha=alpha, margin=0.0))
        assert [claim.verdict for claim in found] == [wanted, "does not hold"]
        assert found[1].p > 0.99
