import pytest

from data_pipeline.files.json_text import MAX_DEPTH, parse_json


def test_nesting_is_bounded() -> None:
    def nested(depth: int) -> str:
        return '{"a": [' * (depth // 2) + "1" + "]}" * (depth // 2)

    assert parse_json(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 2, 5000, 200_000):
        with pytest.raises(ValueError, match="nested deeper than 100"):
            parse_json(nested(depth))


def test_digits_are_bounded() -> None:
    assert parse_json("9" * 4000) > 10**3999
    with pytest.raises(ValueError, match="4300 digits"):
        parse_json("9" * 20_000)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe{", '{"a": }'])
def test_what_is_no_json_is_a_value_error(text: str | bytes) -> None:
    with pytest.raises(ValueError):
        parse_json(text)
