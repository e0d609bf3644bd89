"""A page of two untrained models over demo-like data."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from pretrain.generation.trained_model import TrainedModel
from pretrain.models.decoder import Decoder
from tests.pretrain.generation.test_facts import model_over
from tests.pretrain.tiny_tokenizers import write_demo_like_data
from tools import side_by_side


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, TrainedModel]:
    """By path, what the tool opens: a, b and one over other data."""
    write_demo_like_data(tmp_path)
    model = model_over(tmp_path)
    found = {
        name: replace(
            model,
            source=replace(model.source, name=name),
            decoder=Decoder(model.decoder.config, seed=seed),
        )
        for name, seed in (("a", 1), ("b", 2))
    }
    found["other"] = replace(model, heldout=tmp_path)
    monkeypatch.setattr(side_by_side, "MOST_TOKENS", 8)
    monkeypatch.setattr(side_by_side, "open_model", lambda path: found[str(path)])
    return found


def test_every_run_continues_the_same_prompts(models: dict[str, TrainedModel], tmp_path: Path) -> None:
    arguments = ["a", "b", "--out", str(tmp_path / "page"), "--pictures", "2", "--others", "1"]
    assert side_by_side.main(arguments) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count("<h2>text to image") == 2 and page.count("<h2>") == 2 + 1 + 1 + 1
    assert page.count("<h3>a</h3>") == page.count("<h3>b</h3>") == page.count("<h3>truth</h3>") == 5
    assert set(re.findall(r'(?:src|href)="(.{5})', page)) == {"data:"} and "url(" not in page
    sheet = Image.open(io.BytesIO((tmp_path / "page" / "pictures.png").read_bytes()))
    assert sheet.height > 2 * side_by_side.SIDE_PX


def test_mistakes_leave_nothing(
    models: dict[str, TrainedModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert side_by_side.main(["a", "b", "--out", str(tmp_path / "there")]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err
    assert side_by_side.main(["a", "other", "--out", str(tmp_path / "out")]) == 2
    assert "other: its held-out data is" in capsys.readouterr().err and not (tmp_path / "out").exists()
