"""Messages and pages name options that commands have."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.data.corpora import list_formats
from pipelines.prepare import PrepareConfig
from tests.unit.platform.test_command_options import COMMANDS, describe_options

ROOT = Path(__file__).parents[3]
PACKAGES = ("platform", "skillnet", "pipelines", "sweeps", "plugins/*/skillnet_*")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w.-]*\w")
#: Forms that parsers read before they look at the keys of a command.
OF_ALL = {"--config", "--json", "--help", "--from", "--corpus", "--pair", "--options"}
#: Below these keys a user chooses the names.
OPEN = re.compile(r"--(options|corpora|tasks|env|space)\.")
#: Options of other programs, and of modules that are no command of `skillnet`.
FOREIGN = {
    "--generate": "ray job submit",
    "--log-level": "uvicorn",
    "--log_samples": "lm-eval",
    "--output_path": "lm-eval",
    "--no-log-samples": "inspect",
    "--no-restart": "ray up",
    "--build-arg": "docker build",
    "--signal": "sbatch",
    "--sort": "tar",
    "--sparse": "tar",
    "--metric": "skillnet-evidence",
    "--unit": "skillnet-evidence",
    "--scale": "skillnet-evidence",
    "--threads": "python -m benchmarks",
    "--key.sub": "an example of the syntax",
}


def _known_options() -> set[str]:
    known = set()
    for command in COMMANDS.values():
        known |= {f"--{line.split(':')[0]}" for line in describe_options(command.config_class)}
    # A study and a sweep take all keys of their runs.
    known |= {f"--run.{option[2:]}" for option in known}
    return known | OF_ALL


def _messages() -> Iterator[tuple[str, str]]:
    for package in PACKAGES:
        for path in sorted(ROOT.glob(f"{package}/**/*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                # Single words are arguments of other programs.
                if (
                    isinstance(node, ast.Constant)
                    and isinstance(node.value, str)
                    and " " in node.value
                ):
                    yield str(path.relative_to(ROOT)), node.value


def _pages() -> Iterator[tuple[str, str]]:
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("plugins/*/README.md")]:
        for code in re.findall(r"`(--[^`]*)`", path.read_text(encoding="utf-8")):
            yield str(path.relative_to(ROOT)), code


@pytest.mark.parametrize("texts", [_messages, _pages], ids=["messages", "pages"])
def test_named_options_exist(texts) -> None:  # type: ignore[no-untyped-def]
    known = _known_options()
    unknown = {
        f"{where}: {option}"
        for where, text in texts()
        for option in OPTION.findall(text)
        if option not in known and option not in FOREIGN and not OPEN.match(option)
    }
    assert not unknown


def test_the_help_of_prepare_names_every_format() -> None:
    help_text = str(PrepareConfig.__doc__)
    missing = [name for name in list_formats() if not re.search(rf"\b{name}\b", help_text)]
    assert missing == []
