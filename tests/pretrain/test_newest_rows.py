import json
from pathlib import Path

from pretrain.newest_rows import heldout_text, last_row, rows_from_end


def test_last_row_is_the_last_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_row(path) == {}
    path.write_text("")
    assert last_row(path) == {}
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "tra')
    assert last_row(path) == {"step": 2}
    assert list(rows_from_end(path)) == [{"step": 2}, {"step": 1}]


def test_held_out_losses_are_those_of_the_newest_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert heldout_text(path) is None
    first = {"step": 1000, "eval/loss": 3.0, "eval/loss/text": 3.5, "eval/loss/image": 2.5}
    second = {"step": 2000, "eval/loss": 2.0, "eval/loss/text": 2.25, "eval/loss/text_to_image": 9.0}
    path.write_text("".join(json.dumps(row) + "\n" for row in (first, second, {"step": 2010})))
    assert heldout_text(path) == "2.0000 (text 2.2500) nats/token at step 2,000"
    causal = second | {"eval/causal/loss": 2.5, "eval/causal/loss/text": 2.75}
    path.write_text(json.dumps(causal) + "\n")
    assert heldout_text(path) == "2.0000 (text 2.2500), causal 2.5000 (text 2.7500) nats/token at step 2,000"
