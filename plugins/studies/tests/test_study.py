"""Trials that a study builds from its configuration, and checks of a resumed study."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.training.config.run import PretrainConfig
from skillnet_evidence.comparison import choose_roles
from skillnet_platform import config as configuration
from skillnet_platform.errors import UserError
from skillnet_studies.config.study import StudyConfig, SystemConfig, TuningConfig
from skillnet_studies.report.run_tables import build_tuning_tables
from skillnet_studies.study import study as st
from skillnet_studies.study import tuning as tn
from skillnet_studies.study.system_runs import build_base_run
from sweeps.config.space import SearchDimension
from sweeps.trials.trial import Trial, TrialOutcome
from tests.helpers.small_corpora import small_config

SYSTEMS = {
    "skillnet": SystemConfig("skillnet"),
    "skillnet-pretrained": SystemConfig("skillnet", pretrain=True),
    "dense": SystemConfig("dense", set={"training.lr": 0.002}),
    "dense-wide": SystemConfig("dense", set={"model.ffn_dim": 48}, reuse_tuning_of="dense"),
}


def study(**values: Any) -> StudyConfig:
    tuning = TuningConfig(
        4, {"training.lr": SearchDimension(loguniform=[1e-4, 1e-2])}, seeds=[77], step_fraction=0.6
    )
    common: dict[str, Any] = {
        "name": "s",
        "seeds": [0, 1],
        "run": small_config(Path("corpora")),
        "systems": SYSTEMS,
        "tuning": tuning,
    }
    return StudyConfig(**(common | values))


def outcome(trial: Trial, score: float | None, status: str = "finished") -> TrialOutcome:
    reports = [{"step": 6, "score": score}] if score is not None else []
    return TrialOutcome(
        trial.name,
        trial.group or trial.name,
        Path(trial.name),
        status,
        result={"step": 6, "seconds": 2.0} if status == "finished" else None,
        reports=reports,
        seed=trial.config.seed,
    )


def space_trials(config: StudyConfig) -> list[Trial]:
    return tn.build_stage_trials(config, "space", tn.start_tuning(config))


def test_every_system_gets_the_same_trials():
    config = study()
    by_system: dict[str, list[Trial]] = {}
    for trial in space_trials(config):
        by_system.setdefault(trial.settings["system"], []).append(trial)
        assert trial.splits == ("validation",)
        assert not trial.config.evaluate
        assert trial.config.seed == 77
        assert trial.config.training.steps == 8
    assert list(by_system) == ["skillnet", "skillnet-pretrained", "dense"]
    points = [[trial.settings.get("training.lr") for trial in own] for own in by_system.values()]
    assert points[0] == points[1] == points[2]
    assert points[0][0] is None
    assert len(set(points[0])) == 4
    rates = [trial.config.training.lr for trial in by_system["dense"]]
    assert rates == [0.002, *points[0][1:]]


def test_final_runs_differ_only_in_the_settings_of_their_system():
    config = study()
    made = {label: st.build_final_trial(config, label, {}, 1) for label in SYSTEMS}
    assert made["skillnet"].name == "skillnet-seed1"
    assert made["skillnet"].splits is None
    plain = configuration.flatten_tree(configuration.to_dict(made["skillnet"].config))
    wide = configuration.flatten_tree(configuration.to_dict(made["dense-wide"].config))
    differing = {key for key in plain.keys() | wide.keys() if plain.get(key) != wide.get(key)}
    assert differing == {"system", "model.ffn_dim"}
    assert made["skillnet"].config.evaluate
    assert made["skillnet"].config.seed == 1
    chosen = st.build_final_trial(config, "dense", {"training.lr": 0.007}, 1)
    assert chosen.config.training.lr == 0.007


def test_a_system_sets_keys_of_its_pretraining():
    own = SystemConfig("skillnet", pretrain=True, set={"pretraining.training.lr": 0.007})
    config = replace(study(pretraining=PretrainConfig()), systems={"own": own})
    trial = st.build_final_trial(config, "own", {}, 0)
    assert trial.pretrain.training.lr == 0.007
    assert trial.config.training.lr == config.run.training.lr
    # A tuned rate goes before a given one.
    tuned = st.build_final_trial(config, "own", {"pretraining.training.lr": 0.001}, 0).pretrain
    assert tuned.training.lr == 0.001
    wrong = replace(own, set={"pretraining.training.rate": 0.1})
    with pytest.raises(UserError, match=r"systems\.own\.set: pretraining.*rate"):
        st.build_final_trial(replace(config, systems={"own": wrong}), "own", {}, 0)
    without = replace(own, pretrain=False)
    with pytest.raises(UserError, match=r"pretraining\.training\.lr needs pretrain: true"):
        st.build_final_trial(replace(config, systems={"own": without}), "own", {}, 0)


def test_pretraining_has_the_seed_and_sizes_of_its_run():
    config = study(pretraining=PretrainConfig(seed=5))
    made = st.build_final_trial(config, "skillnet-pretrained", {}, 1)
    plan = made.pretrain
    assert isinstance(plan, PretrainConfig)
    assert (plan.seed, plan.system, plan.data) == (1, "skillnet", "corpora")
    assert plan.model.dim == made.config.model.dim == 16
    assert plan.model.tasks == config.pretraining.model.tasks
    assert st.build_final_trial(config, "skillnet", {}, 1).pretrain is None
    # Trials that differ in how they are trained later share one pretraining.
    trials = [t for t in space_trials(config) if t.pretrain]
    assert len({configuration.digest_config(t.pretrain) for t in trials}) == 1


def test_the_best_validation_score_is_chosen_and_reported():
    config = study()
    trials = space_trials(config)
    scores = {"skillnet": [0.3, 0.5, 0.5, 0.4], "skillnet-pretrained": [0.6, 0.2, 0.1, 0.3]}
    scores["dense"] = [0.1, 0.2, None, 0.4]
    outcomes = []
    for trial in trials:
        score = scores[trial.settings["system"]][int((trial.group or "")[-1])]
        outcomes.append(outcome(trial, score, "finished" if score is not None else "failed"))
    tuned = tn.choose_settings(config, "space", tn.start_tuning(config), trials, outcomes)
    assert list(tuned) == list(SYSTEMS)
    assert tuned["skillnet"].settings == tuned["skillnet"].trials[1]["settings"]
    assert tuned["skillnet-pretrained"].settings == {}
    assert tuned["dense"].score == 0.4
    assert tuned["dense"].trials[2]["status"] == "failed"
    assert tuned["dense-wide"].settings == tuned["dense"].settings
    chosen, every = build_tuning_tables(tuned)
    assert [row[1].text for row in chosen.rows] == ["4", "4", "4", "as dense"]
    assert [row[2].text for row in chosen.rows] == ["30.0", "60.0", "10.0", "–"]
    assert "4 trial(s) of 8 steps" in chosen.caption
    assert sum(row[3].is_best for row in every.rows) == 4  # two of skillnet's are equal
    with pytest.raises(UserError, match="no tuning trial of dense finished"):
        kept = [o for o in outcomes if not o.name.startswith("dense")]
        tn.choose_settings(config, "space", tn.start_tuning(config), trials, kept)


def test_the_report_lists_limits_of_equal_tuning():
    trial = {"settings": {"training.lr": 0.1}, "status": "finished", "score": 0.5}
    trial |= {"stage": "space", "steps": 6, "seconds": 1.0}
    tuned = {
        "skillnet": tn.TuningResult("skillnet", {}, 0.5, [trial]),
        "skillnet-pretrained": tn.TuningResult("skillnet-pretrained", {}, 0.5, [], "skillnet"),
    }
    caption = build_tuning_tables(tuned, ["skillnet-pretrained"])[0].caption
    assert caption.startswith("Every system that takes no settings from another one got 1 trial(s)")
    assert "Tuned: training.lr. All other settings are equal for all systems" in caption
    assert "Settings tuned for another system: skillnet-pretrained uses skillnet." in caption
    assert "tuned without the pretraining" in caption
    assert "The pretraining of skillnet-pretrained, and its learning rate, has no tuning" in caption
    own = {label: tn.TuningResult(label, {}, 0.5, [trial]) for label in tuned}
    caption = build_tuning_tables(own, ["skillnet-pretrained"])[0].caption
    assert caption.startswith("Every system got 1 trial(s)")
    assert "tuned for another system" not in caption
    assert "tuned without the pretraining" not in caption
    assert "pretraining" not in build_tuning_tables(own)[0].caption


def test_without_tuning_nothing_is_chosen():
    config = study(tuning=TuningConfig())
    assert space_trials(config) == []
    tuned = tn.start_tuning(config)
    assert all(own.settings == {} for own in tuned.values())
    assert build_tuning_tables(tuned) == []


def test_the_ledger_round_trips(run_root: Path):
    config = study()
    trials = [st.build_final_trial(config, "dense", {}, seed) for seed in (0, 1)]
    outcomes = [outcome(trials[0], None), outcome(trials[1], None, "failed")]
    for each in outcomes:
        each.folder = config.folder / "runs" / each.name
    tuned = {"dense": tn.TuningResult("dense", {"training.lr": 0.1}, 0.5, [])}
    config.folder.mkdir()
    st.write_study_ledger(config, tuned, outcomes)
    again, runs = st.read_study_ledger(config.folder)
    assert again == tuned
    assert runs == [("dense", config.folder / "runs" / "dense-seed0")]


def begun(config: StudyConfig, trial: Trial, group: str) -> Path:
    """Write the configuration of a started run."""
    folder = config.folder / group / trial.name
    folder.mkdir(parents=True)
    start = folder.parent / "pretraining-1"
    made = trial.config
    if trial.pretrain is not None:
        made = replace(made, init_from=str(start / "model"))
        start.mkdir(exist_ok=True)
        joint = configuration.to_yaml(trial.pretrain.joint())
        (start / "config.yaml").write_text(joint, encoding="utf-8")
    (folder / "config.yaml").write_text(configuration.to_yaml(made), encoding="utf-8")
    return folder


def test_a_study_resumes_only_with_unchanged_settings(run_root: Path):
    lesson = SystemConfig("skillnet", pretrain=True, reuse_tuning_of="skillnet")
    few = {"skillnet": SystemConfig("skillnet"), "skillnet-pretrained": lesson}
    tuning = TuningConfig(
        2, {"training.lr": SearchDimension(loguniform=[1e-4, 1e-2])}, step_fraction=0.6
    )
    common: dict[str, Any] = {"seeds": [0], "systems": few, "tuning": tuning}
    config = study(**common)
    config.folder.mkdir()
    (config.folder / "study.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    for trial in space_trials(config):
        begun(config, trial, "tuning")
    tuned = {label: tn.TuningResult(label, {"training.lr": 0.1}) for label in few}
    for trial in st.build_final_trials(config, tuned):
        begun(config, trial, "runs")
    st.write_study_ledger(config, tuned, [])
    more = few | {"moe": SystemConfig("moe")}
    st.check_study(study(**common | {"seeds": [0, 1], "systems": more, "reference": "moe"}))

    shorter = replace(config.run, training=replace(config.run.training, steps=10))
    with pytest.raises(UserError) as raised:
        st.check_study(study(**common | {"run": shorter}))
    message = str(raised.value)
    assert message.startswith(
        "the study s has run.training.steps 12, not 10; its run skillnet-t0-seed1000 "
    )
    assert (
        "with training.steps 8, not 6. Give another --name, or resume the study with --config "
        in message
    )
    space = {"training.lr": SearchDimension(loguniform=[1e-3, 1e-1])}
    wider = study(**common | {"tuning": replace(tuning, space=space)})
    with pytest.raises(UserError, match=r"the study s has tuning\.space\.training\.lr\.loguniform"):
        st.check_study(wider)
    # Once the trials are gone, another space is free to be tried.
    shutil.rmtree(config.folder / "tuning")
    st.check_study(wider)
    before = replace(config.pretraining, training=replace(config.pretraining.training, lr=0.5))
    with pytest.raises(
        UserError, match=r"skillnet-pretrained-seed0 was trained with a pretraining"
    ):
        st.check_study(study(**common | {"pretraining": before}))
    alone = few | {"skillnet-pretrained": replace(lesson, pretrain=False)}
    with pytest.raises(UserError, match=r"systems\.skillnet-pretrained\.pretrain True, not False"):
        st.check_study(study(**common | {"systems": alone}))
    chosen = st.build_final_trial(config, "skillnet", {"training.lr": 0.3}, 0)
    with pytest.raises(
        UserError, match=r"skillnet-seed0 was trained with training\.lr 0\.1, not 0\.3"
    ):
        st.check_unchanged(config, [chosen], config.folder / "runs")


def test_a_started_run_has_the_tasks_and_outputs_of_its_corpora(run_root: Path):
    config = study(systems={"dense": SystemConfig("dense")}, tuning=TuningConfig())
    (trial,) = (st.build_final_trial(config, "dense", {}, seed) for seed in config.seeds[:1])
    name, *absent = trial.config.tasks
    model = trial.config.model
    # As at the start: a task without rows is left out, and the corpus has other classes.
    started = replace(model, tasks={name: replace(model.tasks[name], outputs=7)})
    one, place = {name: trial.config.tasks[name]}, config.folder / "runs"
    begun(config, replace(trial, config=replace(trial.config, model=started, tasks=one)), "runs")
    st.check_unchanged(config, [replace(trial, config=replace(trial.config, tasks=one))], place)
    with pytest.raises(UserError, match=rf"was trained with .*tasks\.{absent[0]}"):
        st.check_unchanged(config, [trial], place)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"seeds": []}, "seeds must not be empty"),
        ({"seeds": [1, 1]}, "seeds must differ, got"),
        ({"seeds": [77]}, r"tuning.seeds \[77\] are also seeds"),
        ({"systems": {"a/b": SystemConfig("dense")}}, "is not a valid directory name"),
        (
            {"systems": {"dense": SystemConfig("dense", reuse_tuning_of="dens")}},
            "reuse_tuning_of: 'dens' is not another system",
        ),
        (
            {"systems": SYSTEMS | {"c": SystemConfig("dense", reuse_tuning_of="dense-wide")}},
            "dense-wide has no tuning trials",
        ),
    ],
)
def test_errors_in_a_study_are_named(values: dict[str, Any], expected: str):
    with pytest.raises(UserError, match=expected):
        study(**values)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (SystemConfig("densee"), "systems.x: unknown system 'densee'; did you mean 'dense'"),
        (SystemConfig("skillnet", options={"a": 1}), "systems.x: .*unknown option 'a'"),
        (SystemConfig("skillnet", set={"model.dimm": 1}), "systems.x.set: .*dimm"),
        (SystemConfig("skillnet", set={"model.dim": "wide"}), "model.dim: expected a whole number"),
    ],
)
def test_errors_in_a_system_are_named(entry: SystemConfig, expected: str):
    with pytest.raises(UserError, match=expected):
        build_base_run(study(systems={"x": entry}), "x", 0)


@pytest.mark.parametrize("name", ["headline", "pilot", "tiny"])
def test_presets_of_studies_expand(name: str):
    config = configuration.parse_config(
        StudyConfig, ["--config", f"studies/{name}"], "skillnet compare"
    )
    assert config.name is not None
    roles = choose_roles(list(config.systems), config.reference, config.specialist)
    assert roles.reference in config.systems
    seen = set()
    for label in config.systems:
        trial = st.build_final_trial(config, label, {}, config.seeds[0])
        assert (trial.pretrain is not None) == label.endswith("-pretrained")
        # A longer arm has a multiple of the steps.
        steps = round(trial.config.training.steps / config.systems[label].steps_factor)
        training = replace(trial.config.training, steps=steps)
        same = replace(trial.config, system="", options={}, model=config.run.model)
        same = replace(same, training=training)
        seen.add(configuration.digest_config({"run": same}))
    assert len(seen) == 1, "systems differ in more than their system, options and model"
    one = replace(config, systems={"skillnet": config.systems["skillnet"]})
    assert len(space_trials(one)) == config.tuning.trials * len(config.tuning.seeds)
