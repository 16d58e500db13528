"""The name of a run whose first process was killed early stays free; a user's folder does not."""

from pathlib import Path

from pipelines.training.runs.layout import CONFIG, LOCK, is_unused, lock_run_folder
from skillnet_platform.storage import atomic_write


def test_a_kill_before_the_configuration_leaves_the_name_free(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / LOCK).touch()
    (run / f".{CONFIG}.sn-{'0' * 16}.tmp").write_text("na", encoding="utf-8")
    assert is_unused(run)
    with lock_run_folder(run), atomic_write(run / CONFIG, "w") as stream:
        stream.write("name: run")
    assert {path.name for path in run.iterdir()} == {CONFIG, LOCK}
    assert not is_unused(run)


def test_a_rejected_command_removes_the_leftovers_of_a_killed_one(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / f".{CONFIG}.sn-{'0' * 16}.tmp").touch()
    with lock_run_folder(run):
        pass
    assert not run.exists()


def test_a_folder_with_a_file_of_a_user_is_used(tmp_path: Path) -> None:
    (tmp_path / ".diary.tmp").touch()
    assert not is_unused(tmp_path)
