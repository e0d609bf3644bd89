"""Dotted keys of nested tables."""

from pretrain.comparison.dotted_keys import covers, dotted_keys, leaves


def test_leaves_are_named_by_their_path_and_an_empty_table_is_a_value() -> None:
    table = {"model": {"towers": {"text": "all"}, "experts": {}}, "seed": 1}
    assert list(leaves(table)) == [("model.towers.text", "all"), ("model.experts", {}), ("seed", 1)]
    assert dotted_keys(table) == ["model.towers.text", "model.experts", "seed"]


def test_a_key_covers_itself_and_what_is_below_it() -> None:
    assert covers("model.towers", "model.towers") and covers("model.towers", "model.towers.text")
    assert not covers("model.tower", "model.towers") and not covers("model.towers.text", "model.towers")
