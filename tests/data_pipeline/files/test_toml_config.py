from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field

from data_pipeline.files.toml_config import ConfigError, apply_override, load_config, validate


class Inner(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    learning_rate: float = Field(1e-3, gt=0)


class Outer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    inner: Inner = Inner()
    towers: dict[str, Inner] = {}
    sources: tuple[Inner, ...] = ()


def problem(values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        validate(Outer, values, source="run.toml")
    return str(error.value)


def test_overrides_are_toml_values_in_nested_tables(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "a"\n[inner]\nlearning_rate = 1.0\n')
    config = load_config(Outer, path, ["inner.learning_rate=2e-4", "name=b", "towers.image.learning_rate=3"])
    assert (config.inner.learning_rate, config.name, config.towers["image"].learning_rate) == (2e-4, "b", 3.0)


@pytest.mark.parametrize("override", ["inner.learning_rate", "=3", ""])
def test_override_without_key_or_value_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="expected key=value"):
        apply_override({}, override)


def test_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match='"name" is a value, not a table'):
        apply_override({"name": "a"}, "name.x=3")


@pytest.mark.parametrize(
    "values, field",
    [
        ({"name": "a", "inner": {"learning_rat": 1}}, "inner.learning_rat"),
        ({"name": "a", "towers": {"image": {"learning_rat": 1}}}, "towers.image.learning_rat"),
        ({"name": "a", "sources": [{"learning_rat": 1}]}, "sources.0.learning_rat"),
    ],
    ids=["table", "table of tables", "list"],
)
def test_unknown_key_names_the_nearest_and_the_legal_ones(values: dict, field: str) -> None:
    message = problem(values)
    assert f'run.toml: {field}: unknown key; did you mean "learning_rate"?' in message
    assert "Legal here: learning_rate" in message


def test_bad_value_is_shown_with_what_is_legal() -> None:
    assert "run.toml: inner.learning_rate = -1: Input should be greater than 0" in problem(
        {"name": "a", "inner": {"learning_rate": -1}}
    )


def test_all_problems_are_listed_at_once() -> None:
    message = problem({"inner": {"learning_rate": "fast"}})
    assert "name: required, but missing" in message
    assert 'inner.learning_rate = "fast": Input should be a valid number' in message


@pytest.mark.parametrize("content, expected", [(None, "no such file"), ("a = [", "not valid TOML")])
def test_unreadable_file_is_named(tmp_path: Path, content: str | None, expected: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=expected) as error:
        load_config(Outer, path)
    assert str(path) in str(error.value)


def test_folder_instead_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(Outer, tmp_path)


def test_a_resolved_config_is_json_and_loads_like_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.resolved.json"
    path.write_text('{"name": "a", "inner": {"learning_rate": 0.5}}')
    config = load_config(Outer, path, ["name=b"])
    assert (config.name, config.inner.learning_rate) == ("b", 0.5)
    path.write_text('{"name": ')
    with pytest.raises(ConfigError, match=r"config\.resolved\.json: not valid JSON"):
        load_config(Outer, path)


def test_keys_and_values_of_earlier_versions_are_told_their_new_names() -> None:
    class Inner(BaseModel):
        model_config = ConfigDict(extra="forbid")
        renamed: ClassVar[dict[str, str]] = {"old": "new", "kind=a": "b"}
        moved: ClassVar[dict[str, str]] = {"far": "other.far"}
        removed: ClassVar[dict[str, str]] = {"gone": "new says it"}
        new: int = 0
        kind: Literal["b", "c"] = "b"

    class Outer(BaseModel):
        table: dict[str, Inner] = {}

    with pytest.raises(ConfigError) as error:
        validate(
            Outer,
            {"table": {"x": {"old": 1}, "y": {"kind": "a"}, "z": {"far": 1, "gone": 1}}},
            source="f.toml",
        )
    assert str(error.value).splitlines() == [
        'f.toml: table.x.old: this key is called "new" now; its values mean what they meant',
        'f.toml: table.y.kind = "a": this value is called "b" now',
        'f.toml: table.z.far: this key has moved to "other.far"; its values mean what they meant',
        "f.toml: table.z.gone: there is no such key any more: new says it; take the key out",
    ]


@pytest.mark.parametrize(
    "text, why",
    [
        ("x = " + "[" * 5000, "nested deeper than 100"),
        ("x = " + "[" * 150 + "]" * 150, "nested deeper than 100"),
        ("name = " + "9" * 20_000, "an integer of more than 64 bits$"),
        ("name = 0x" + "f" * 20_000, "more than 64 bits"),
        ("name = [{a = 9223372036854775808}]", "more than 64 bits"),
    ],
    ids=["unclosed", "deep", "decimal", "hexadecimal", "inside"],
)
def test_depth_and_digits_are_bounded(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"run\.toml: not valid TOML: .*{why}") as error:
        load_config(Outer, path)
    assert len(str(error.value)) < 400
    value = text.partition("= ")[2]
    with pytest.raises(ConfigError, match=r"run\.toml: name") as error:
        validate(Outer, {"name": "a"} | overridden(f"name={value}"), source="run.toml")
    assert len(str(error.value)) < 1200


def overridden(override: str) -> dict:
    values: dict = {}
    apply_override(values, override)
    return {"name": [values["name"]]}


def test_links_in_a_circle_and_endless_files_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "run.toml").symlink_to("run.toml")
    with pytest.raises(ConfigError, match=r"run\.toml: cannot be read as a TOML file: .*symbolic links"):
        load_config(Outer, tmp_path / "run.toml")
    with pytest.raises(ConfigError, match="/dev/zero: longer than 10000000 characters"):
        load_config(Outer, "/dev/zero")


def test_an_unknown_key_forges_no_line() -> None:
    message = problem({"name": "a", "inner": {"x\nmotley: all is well\x1b[2J": 1}})
    assert message.isprintable() and r"inner.x\nmotley: all is well\x1b[2J: unknown key" in message
