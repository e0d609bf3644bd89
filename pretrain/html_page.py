"""Pages that need no network, reports and samples, are made of templates. This module imports no torch."""

from pathlib import Path

import jinja2


def environment(folder: Path) -> jinja2.Environment:
    """Return the environment of the HTML templates in `folder`: values are escaped, unknown names refused."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
