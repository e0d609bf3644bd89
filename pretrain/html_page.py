"""Pages that need no network, reports and samples, are made of templates. This module imports no torch."""

import re
from pathlib import Path

import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Return the environment of the HTML templates in `folder`: values are escaped, unknown names refused.

    The filter `unbroken` keeps a number and its unit on one line.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["unbroken"] = lambda text: re.sub(r"(?<=\d) (?=%|[kMBT] )", "\u00a0", text)
    return templates
