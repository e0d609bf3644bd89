"""The page of a step: texts, borders of documents, context, counts and what confirms them."""

import json
from pathlib import Path

import pytest

from data_pipeline.tokenize.prepare import tokenize
from tests.data_pipeline.tokenize.tiny_text_tokenizers import hugging_face_file
from tests.pretrain.audit.consumed_run import read_run
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.tiny_tokenizers import write_tokenized_data
from tools.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on questions, which are context, and their answers."""
    folder = tmp_path_factory.mktemp("page")
    rows = [{"q": f"Q{i}: is <b> size?", "a": f"A{i} is {i % 7}."} for i in range(40)]
    (folder / "raw").mkdir()
    (folder / "raw/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = hugging_face_file(folder / "file")
    (folder / "data.toml").write_text(
        f'[text]\nkind = "huggingface"\nfile = "{path}"\n[source]\n'
        'parts = [{text = "json:q", loss = false}, {text = "json:a"}]\n'
    )
    tokenize(folder / "raw", folder / "train", config_path=str(folder / "data.toml"), processes=1)
    model = tiny_run(folder, folder)["model"] | {"vocab_tokens": 320, "towers": {"text": "text"}}
    read_run(folder, folder / "runs", steps=4, model=model, loss_weights={"text": 0.5})
    return folder


def test_the_page_shows_what_the_step_read(folder: Path) -> None:
    run = folder / "runs/tiny"
    assert main(["inspect", "data", str(run), "--step", "2", "--sequences", "3"]) == 0
    page = (run / "data_step_00000002.html").read_text()
    assert "http://" not in page and "https://" not in page and "<script" not in page
    assert page.count("<h2>sequence ") == 3 and "shown: the first 3 of 4 sequences" in page
    assert page.count('<section class="card">') == page.count('<div class="context">') > 3
    assert "is &lt;b&gt; size?</p>" in page and "the fingerprint of step 2 confirms" in page
    assert "<td>0.5</td>" in page
    assert main(["inspect", "data", str(run), "--step", "5", "--out", str(folder / "next.html")]) == 0
    assert "it is what comes next" in (folder / "next.html").read_text()


def test_pictures_are_shown_from_their_vectors(tmp_path: Path) -> None:
    vocabulary = write_tokenized_data(tmp_path, vectors=True)
    towers = {name: name for name in vocabulary.modalities}
    model = tiny_run(tmp_path, tmp_path)["model"] | {"vocab_tokens": vocabulary.size, "towers": towers}
    run = read_run(tmp_path, tmp_path / "runs", steps=2, model=model)
    assert main(["inspect", "data", str(run), "--step", "2", "--sequences", "4"]) == 0
    page = (run / "data_step_00000002.html").read_text()
    assert page.count('src="data:image/png') >= 2 and "the fingerprint of step 2 confirms" in page


def test_steps_that_are_none_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["data", "runs/tiny", "--step", "6"], "has made steps 1 ... 4; legal: 1 ... 5"),
        (["data", "runs/tiny"], "name the step with --step N"),
        (["runs/tiny", "--step", "2"], "expected RUN, or `data RUN --step N`"),
        (["data", str(folder), "--step", "1"], "no run directory"),
    ):
        assert main(["inspect", *(a.replace("runs/", f"{folder}/runs/") for a in arguments)]) == 2
        assert message in capsys.readouterr().err
