"""What a page made of hostile text would do: parsed as a browser parses it."""

from html.parser import HTMLParser

#: Each sets a mark where it runs; one of them for each place in a page.
HOSTILE = (
    "<script>document.documentElement.dataset.marked=1</script>",
    '"><img src=x onerror="document.documentElement.dataset.marked=1">',
    "' onmouseover='document.documentElement.dataset.marked=1' x='",
    "javascript:document.documentElement.dataset.marked=1",
    "</style></title></pre></textarea><svg onload=document.documentElement.dataset.marked=1>",
    "{{ 7 * 7 }}{% raw %}<!--",
    "&lt;script&gt;document.documentElement.dataset.marked=1&lt;/script&gt;\u202e",
)
NASTY = " ".join(HOSTILE)


class Page(HTMLParser):
    """Collects elements, attributes and the text that is shown.

    Args:
        text: content of the page.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.shown = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.shown += data


def assert_harmless(text: str) -> Page:
    """Nothing in a page runs or asks for anything from outside, and its policy forbids both."""
    page = Page(text)
    assert not {"script", "svg", "iframe", "object", "embed", "form", "base", "link"} & page.tags
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        if name in ("src", "href", "action", "formaction", "srcdoc", "xlink:href"):
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    policy = [value for _, name, value in page.attributes if name == "content"]
    assert any("default-src 'none'" in value and "script-src" not in value for value in policy)
    return page
