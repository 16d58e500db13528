"""Pages of HTML that need nothing else: every value is escaped, and the one head that all have
forbids scripts and everything from outside."""

import functools
from collections.abc import Mapping
from typing import Any

PACKAGE = "skillnet_platform"


def render_page(template: str, values: Mapping[str, Any], package: str = PACKAGE) -> str:
    """A template, filled in. Values are escaped, whatever they hold.

    Args:
        template: a file in ``templates`` of the package, or of this one; pages extend
            ``page.html``, which has the head.
        values: what it names; one that it lacks raises ``jinja2.UndefinedError``.
        package: that has the template.
    """
    text: str = _environment(package).get_template(template).render(values)
    return text


@functools.cache
def _environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, PACKAGE))]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
