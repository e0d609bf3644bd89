from pretrain.comparison.leaves import dotted_keys, leaves


def test_leaves_are_named_by_their_path_and_an_empty_table_is_a_value() -> None:
    table = {"model": {"towers": {"text": "all"}, "experts": {}}, "seed": 1}
    assert list(leaves(table)) == [("model.towers.text", "all"), ("model.experts", {}), ("seed", 1)]
    assert dotted_keys(table) == ["model.towers.text", "model.experts", "seed"]
