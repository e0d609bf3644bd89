"""The choice of rows that tests marked `pairwise` or `diagonal` run."""

from itertools import combinations, product

from tests.pairwise import diagonal, pairwise

SIZES = {"rule": 2, "gate": 5, "scale": 3, "place": 3}
ROWS = [
    dict(zip(SIZES, map(str, values), strict=True)) for values in product(*(range(n) for n in SIZES.values()))
]


def pairs(rows: list[dict[str, str]]) -> set[object]:
    return {pair for row in rows for pair in combinations(row.items(), 2)}


def test_few_rows_hold_every_pair_of_values() -> None:
    chosen = [ROWS[index] for index in pairwise(ROWS)]
    assert pairs(chosen) == pairs(ROWS)
    assert len(chosen) <= 18  # of 90; 15 are the least, 5 gates by 3 scales


def test_of_rows_that_are_no_whole_product_the_same_holds() -> None:
    rows = [row for row in ROWS if row["gate"] != "4" or row["scale"] == "0"]
    assert pairs([rows[index] for index in pairwise(rows)]) == pairs(rows)


def test_of_one_parameter_every_value_is_kept() -> None:
    assert pairwise([{"stage": "0"}, {"stage": "1"}, {"stage": "2"}]) == [0, 1, 2]


def test_a_diagonal_holds_every_value_of_the_longest_parameter_once_and_the_others_in_turn() -> None:
    names = ("config", "changes", "present", "dtype")
    rows = [dict(zip(names, (c, c, p, d), strict=True)) for c, p, d in product(range(5), range(2), range(3))]
    chosen = [rows[index] for index in diagonal(rows)]
    assert [row["config"] for row in chosen] == [row["changes"] for row in chosen] == [0, 1, 2, 3, 4]
    assert [row["present"] for row in chosen] == [0, 1, 0, 1, 0]
    assert [row["dtype"] for row in chosen] == [0, 1, 2, 0, 1]
