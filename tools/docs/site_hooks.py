"""MkDocs hooks: pages that are generated, and links that lead out of ``docs/``.

- One page per command, with the output of ``skillnet COMMAND --help all``.
- The decisions join the navigation in the order of their numbers.
- Decisions, results and studies come after guides in a search.
- Sphinx roles of docstrings (``:meth:``) are left out, since mkdocstrings prints them.
- No line breaks within an interval, such as ``(49.9–64.4)``.
- The build fails if a page loads a script, style, font or image from another host.
- A link to a file of the repository outside ``docs/`` becomes the file's path as code, since the
  site contains only ``docs/``.
"""

import contextlib
import io
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from skillnet_platform import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "reference/commands"
LINK = re.compile(r"(!?)\[([^\]\n]*(?:\n[^\]\n]+)?)\]\(([^)\s#]+)(#[^)\s]*)?\)")

#: A Sphinx role, and the start of its target if only the last part is to be shown.
ROLE = re.compile(r":(?:[a-z]+:)+<code>(?:~[\w.]*\.)?")
#: Folder of pages -> weight of a match in a search; other pages have 1.
SEARCH_BOOSTS = {"decisions/": 0.2, "results/": 0.4, "study/": 0.4, "reference/commands/": 0.6}
#: The ends of an interval between brackets, and what is between them.
INTERVAL = re.compile(r"(?<=\()([+−]?\d[\d.]*)(–| to )([+−]?\d[\d.]*)(?=\))")
#: Between the ends -> the same without a place for a line break.
UNBROKEN = {"–": "–&NoBreak;", " to ": "&nbsp;to&nbsp;"}
#: A resource that a browser loads from another host when it shows the page.
REMOTE = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link(?=[^>]*rel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*href=["']?(?:https?:)?//[^>]*>"""
)


def command_names() -> list[str]:
    """Return the commands of this repository, in the order of ``skillnet --help``."""
    return [name for name in cli.SUMMARIES if name in cli.find_commands()]


def help_text(command: str) -> str:
    """Return the output of ``skillnet COMMAND --help all``."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        code = cli.main([command, "--help", "all"])
    if code:
        raise RuntimeError(f"skillnet {command} --help all: exit code {code}")
    return stream.getvalue().rstrip()


def command_page(command: str) -> str:
    """Return the Markdown page of a command."""
    summary = cli.SUMMARIES[command]
    return (
        f"---\nhide: [toc]\n---\n# skillnet {command}\n\n{summary[0].upper()}{summary[1:]}.\n\n"
        f"`skillnet {command} --help` shows the essential options, and `--help all` this page.\n\n"
        f"```text\n{help_text(command)}\n```\n"
    )


def replace_outside_links(markdown: str, page: str) -> str:
    """Replace links that lead out of ``docs/`` by the path of the file.

    Args:
        markdown: text of a page.
        page: path of the page relative to ``docs/``, with slashes.

    Raises:
        ValueError: a link names a file that does not exist.
    """

    def replaced(match: re.Match[str]) -> str:
        image, label, target = match[1], match[2], match[3]
        if image or "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
        if path.startswith("docs/"):
            return match[0]
        if not (ROOT / path).exists():
            raise ValueError(f"docs/{page}: {target} does not exist. Correct the link.")
        plain = label.strip("`")
        return f"`{path}`" if plain == path else f"{label} (`{path}`)"

    return LINK.sub(replaced, markdown)


def on_config(config: MkDocsConfig, **_: Any) -> MkDocsConfig:
    """Add the generated pages and the decisions to the navigation."""
    names = (path.name for path in (ROOT / "docs" / "decisions").glob("*.md"))
    subjects = sorted(name for name in names if name != "index.md")
    pages: list[Any] = ["decisions/index.md", *(f"decisions/{name}" for name in subjects)]
    commands = [{name: f"{COMMANDS}/{name}.md"} for name in command_names()]
    nav: list[Any] = config.nav or []
    for entry in nav:
        if "Project" in entry:
            entry["Project"].append({"Decisions": pages})
        if "Reference" in entry:
            entry["Reference"].append({"Commands": commands})
    return config


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """Add one page per command."""
    for name in command_names():
        path = f"{COMMANDS}/{name}.md"
        files.append(File.generated(config, path, content=command_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that lead out of the site, and weight the page in a search."""
    for folder, boost in SEARCH_BOOSTS.items():
        if page.file.src_uri.startswith(folder):
            page.meta.setdefault("search", {"boost": boost})
    return replace_outside_links(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Leave out Sphinx roles before code, and line breaks within intervals."""
    return INTERVAL.sub(lambda m: f"{m[1]}{UNBROKEN[m[2]]}{m[3]}", ROLE.sub("<code>", html))


def on_post_build(config: MkDocsConfig, **_: Any) -> None:
    """Fail if a page loads a resource from another host.

    Raises:
        PluginError: names the page and the element.
    """
    for page in sorted(Path(config.site_dir).rglob("*.html")):
        if found := REMOTE.search(page.read_text(encoding="utf-8")):
            raise PluginError(f"{page.name}: {found[0]} loads from another host. Use a local copy.")
