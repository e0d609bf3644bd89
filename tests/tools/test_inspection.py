import json
from pathlib import Path

import pytest
from PIL import Image

from tests.tools.conftest import trained
from tools.cli import main


def test_tables_and_a_picture_of_a_depth_routed_run(
    depth_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = depth_run.parent / "runs" / "tiny"
    assert main(["inspect", str(run), "--documents", "2"]) == 0
    told = capsys.readouterr().out
    picture = run / "selected_tokens_step_00000024.png"
    assert f"{picture}: 2 images of held-out documents" in told
    lines = [line.split() for line in told.splitlines()]
    of_images = [line[:3] for line in lines if line[1:2] == ["image"]]
    assert of_images == [["0", "image", "0.500"], ["1", "image", "0.500"]]
    assert Image.open(picture).size[0] > 500

    out = tmp_path / "own.png"
    assert main(["inspect", str(depth_run), "--documents", "0", "--out", str(out), "--causal"]) == 0
    assert "ratios alone: --documents 0" in capsys.readouterr().out and out.exists()
    assert main(["inspect", str(run), "--out", str(tmp_path / "none" / "x.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_shares_of_experts_and_a_model_that_chooses_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, experts={"text": {"num_experts": 4}})
    assert main(["inspect", str(run)]) == 0
    told = capsys.readouterr().out
    assert "no picture: the model has no depth routing" in told
    rows = [line.split() for line in told.splitlines() if line.split()[1:2] == ["text"]]
    assert len(rows) == 2
    for _, _, dropped, *shares in rows:
        # Expert choice: equal loads, of each sequence rounded up.
        assert len(shares) == 4 and len(set(shares)) == 1 and 0.25 <= float(shares[0]) < 0.3
        assert 0 < float(dropped) < 0.75

    resolved = tmp_path / "runs" / "tiny" / "config.resolved.json"
    values = json.loads(resolved.read_text())
    values["model"]["experts"] = {}
    resolved.write_text(json.dumps(values))
    assert main(["inspect", str(run)]) == 2
    assert "neither model.depth nor model.experts" in capsys.readouterr().err
