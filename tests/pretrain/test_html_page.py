from pathlib import Path

import jinja2
import pytest

from pretrain.html_page import environment


def test_values_are_escaped_and_unknown_names_are_errors(tmp_path: Path) -> None:
    (tmp_path / "page.html.j2").write_text("{% if shown %}\n<p>{{ text }}</p>\n{% endif %}\n")
    page = environment(tmp_path).get_template("page.html.j2")
    assert page.render(shown=True, text="<b>") == "<p>&lt;b&gt;</p>\n"
    with pytest.raises(jinja2.UndefinedError):
        page.render(shown=True)
    (tmp_path / "unit.html.j2").write_text("{{ text | unbroken }}")
    unit = environment(tmp_path).get_template("unit.html.j2")
    assert unit.render(text="95 % of 2 arms") == "95\u00a0% of 2 arms"
