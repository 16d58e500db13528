"""Every protection that docs/security.md claims names a test, and the test exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_the_tests_of_the_threat_model_exist() -> None:
    files: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("plugins/**/test_*.py")]):
        files.setdefault(path.name, []).append(path.read_text(encoding="utf-8"))
    named = sorted(set(re.findall(r"`(test_\w+\.py)::(test_\w+)`", PAGE)))
    missing = [
        f"{file}::{test}"
        for file, test in named
        if len(files.get(file, [])) != 1
        or not re.search(rf"^\s*def {test}\(", files[file][0], re.MULTILINE)
    ]
    assert missing == []


def test_every_bullet_of_the_threat_model_names_a_test() -> None:
    bullets = re.findall(r"^- .*\n(?:  .*\n)*", PAGE, re.MULTILINE)
    assert len(bullets) > 100
    named = re.compile(r":(,?\s+`test_\w+\.py::test_\w+`)+\n$")
    assert [each for each in bullets if not named.search(each)] == []
