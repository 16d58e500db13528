"""Self-contained HTML pages.

Every value is escaped. The shared head forbids scripts and external resources.
"""

import functools
from collections.abc import Mapping
from typing import Any

PACKAGE = "skillnet_platform"


def render_page(template: str, values: Mapping[str, Any], package: str = PACKAGE) -> str:
    """Return a template filled with escaped values.

    Args:
        template: file in ``templates`` of ``package`` or of this package. Pages extend
            ``page.html``, which has the head.
        values: variables of the template. A missing variable raises ``jinja2.UndefinedError``.
        package: package that has the template.
    """
    text: str = _environment(package).get_template(template).render(values)
    return text


@functools.cache
def _environment(package: str) -> Any:
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in dict.fromkeys((package, PACKAGE))]),
        # Names of runs and files may come from others and contain scripts.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
