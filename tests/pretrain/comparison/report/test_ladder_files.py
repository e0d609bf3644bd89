"""The CSV and JSON files of a ladder."""

import csv
import io
import json

import pytest

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.report.ladder_files import cells_csv, runs_csv, shares_csv, summary


def test_files_hold_what_the_findings_hold(turning_ladder: LadderFindings) -> None:
    ladder = turning_ladder
    runs = list(csv.DictReader(io.StringIO(runs_csv(ladder))))
    assert len(runs) == 30 * 4
    first = runs[0]
    cell, findings = next(iter(ladder.cells.items()))
    assert float(first["loss_nats_per_token"]) == pytest.approx(findings.losses["dense", "text"].per_seed[0])
    assert (first["size"], int(first["tokens"])) == ("d32", cell.tokens)
    cells = list(csv.DictReader(io.StringIO(cells_csv(ladder))))
    assert len(cells) == 5 * 4
    interval = findings.effects["mot", "text"].interval
    assert interval is not None and float(cells[0]["low"]) == pytest.approx(interval.low)
    shares = list(csv.DictReader(io.StringIO(shares_csv(ladder))))
    assert len(shares) == 3 * 3 and float(shares[0]["s"]) == pytest.approx(1, abs=0.1)
    plain = json.loads(json.dumps(summary(ladder), allow_nan=False))
    assert plain["runs"] == "30 of 30 runs finished" and len(plain["cells"]) == 5 * 4
    assert len(plain["turns"]) == 6
