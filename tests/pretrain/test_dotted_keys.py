"""Dotted keys of nested tables."""

from pretrain.dotted_keys import covers, value_at


def test_a_key_covers_itself_and_what_is_below_it() -> None:
    assert covers("model.towers", "model.towers") and covers("model.towers", "model.towers.text")
    assert not covers("model.tower", "model.towers") and not covers("model.towers.text", "model.towers")


def test_a_value_is_found_by_its_key() -> None:
    assert value_at({"model": {"towers": {"text": "all"}}}, "model.towers.text") == "all"
