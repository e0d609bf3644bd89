"""The fingerprint of a plan, from the index, is that of the bytes that ranks read."""

import json
from pathlib import Path

from pretrain.audit.contents import differing_rows, digest_of, documents_named
from pretrain.audit.steps import consumed_steps, open_run
from pretrain.run_files import METRICS
from tests.pretrain.audit.consumed_run import read_run, write_masked_data


def test_rows_of_a_run_agree_and_others_do_not(tmp_path: Path) -> None:
    write_masked_data(tmp_path)
    folder = read_run(tmp_path, tmp_path / "runs", steps=8, dp_size=2)
    run = open_run(folder)
    assert list(differing_rows(run, consumed_steps(run))) == [(2, True), (4, True), (6, True), (8, True)]
    rows = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    rows[2]["data/fingerprint"] = rows[1]["data/fingerprint"]
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = open_run(folder)
    found = [agrees for _, agrees in differing_rows(changed, consumed_steps(changed))]
    assert found == [True, True, False, True]


def test_the_masks_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    digests = []
    for every in (3, 4):
        write_masked_data(tmp_path / str(every), every)
        run = open_run(read_run(tmp_path / str(every), tmp_path / f"runs{every}", steps=2))
        digests.append([digest_of(run.stream, step.plan) for step in consumed_steps(run)])
    assert digests[0] != digests[1], "the same ids, of which others are targets"


def test_names_of_metrics_are_found(tmp_path: Path) -> None:
    write_masked_data(tmp_path)
    run = open_run(read_run(tmp_path, tmp_path / "runs", steps=2))
    name = f"{tmp_path / 'train'}/tokens-00001.tar/000000041"
    assert documents_named(run.stream, [name, f"{tmp_path}/train/tokens-00009.tar/1", "x"]) == [(0, 41)]
