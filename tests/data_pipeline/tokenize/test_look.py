"""Layouts of public data, written small, through `motley look` and the table that it prints, to tokens."""

import io
import json
import tarfile
import tomllib
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import soundfile
from pyarrow import parquet

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.tokenize.look import look
from data_pipeline.tokenize.prepare import tokenize
from tests.data_pipeline.raw_documents import CONFIG, WORDS, picture, png, tone, write_raw
from tools.cli import main

COUNT = 24


def caption(number: int) -> str:
    return " ".join(WORDS[(number + step) % len(WORDS)] for step in range(6))


def flac(number: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(number), 16_000, format="FLAC")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def img2dataset(folder: Path) -> None:
    members = {}
    for n in range(COUNT):
        values = {"caption": caption(n), "url": f"http://host/{n}", "status": "success", "exif": "{}"}
        content = {"jpg": png(picture(n)), "txt": caption(n).encode(), "json": json.dumps(values).encode()}
        members |= {f"{n:09}.{ending}": data for ending, data in content.items()}
    write_tar(folder / "00000.tar", members)
    (folder / "00000.parquet").write_bytes(b"PAR1")
    (folder / "00000_stats.json").write_text('{"count": 24}')


def librispeech(folder: Path) -> None:
    members = {}
    for n in range(COUNT):
        members |= {f"1089-134686-{n:04}.FLAC": flac(n), f"1089-134686-{n:04}.txt": caption(n).encode()}
    write_tar(folder / "train-clean-000000.tgz", members, "w:gz")


def llava(folder: Path) -> None:
    (folder / "images").mkdir()
    rows = []
    for n in range(COUNT):
        turns = [
            {"from": "human", "value": "<image>\nWhat is shown?" if n % 4 else "What is it?"},
            {"from": "gpt", "value": caption(n)},
        ]
        rows.append({"id": f"{n}", "conversations": turns} | ({"image": f"images/{n}.jpg"} if n % 4 else {}))
        (folder / "images" / f"{n}.jpg").write_bytes(png(picture(n)))
    (folder / "llava_mix.json").write_text(json.dumps(rows))


def json_lines(folder: Path) -> None:
    rows = [{"text": caption(n), "meta": {"source": "web"}} for n in range(COUNT)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))


def parquet_rows(folder: Path) -> None:
    rows = [{"text": caption(n), "image": {"bytes": png(picture(n)), "path": None}} for n in range(COUNT)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


def plain_text(folder: Path) -> None:
    for n in range(COUNT):
        (folder / f"book.{n}.txt").write_text(caption(n))


def dotted_keys(folder: Path) -> None:
    members = {}
    for n in range(COUNT):
        parts = [{"text": caption(n)}, {"image": "0.png"}]
        members |= {
            f"v1.5_{n}.json": json.dumps({"parts": parts}).encode(),
            f"v1.5_{n}.0.png": png(picture(n)),
        }
    write_tar(folder / "a.tar", members)


def interleaved(folder: Path) -> None:
    """Half of the documents as OBELICS has them, half as MMC4."""
    aligned, matched = {}, {}
    for n in range(COUNT // 2):
        values = {"texts": [caption(n), None, caption(n + 1)], "images": [None, f"{n:06}.0.jpg", None]}
        content = {"json": json.dumps(values).encode(), "0.jpg": png(picture(n))}
        aligned |= {f"{n:06}.{ending}": data for ending, data in content.items()}
        info = [{"image_name": f"m{n}.0.png", "matched_text_index": 1, "matched_sim": 0.3}]
        values = {"text_list": [caption(n), caption(n + 1)], "image_info": info, "url": "u"}
        content = {"json": json.dumps(values).encode(), "0.png": png(picture(n))}
        matched |= {f"m{n}.{ending}": data for ending, data in content.items()}
    write_tar(folder / "obelics-000000.tar", aligned)
    write_tar(folder / "mmc4-000000.tar", matched)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    write_raw(folder / "raw", shards=1)
    (folder / "data.toml").write_text(CONFIG)
    tokenize(folder / "raw", folder / "out", config_path=folder / "data.toml", processes=1)
    return folder / "out" / "tokenizers"


@pytest.mark.parametrize(
    ("write", "name", "modalities"),
    [
        (img2dataset, "img2dataset", {"text", "image"}),
        (librispeech, "LibriSpeech", {"text", "speech"}),
        (llava, "LLaVA", {"text", "image"}),
        (json_lines, "rows of text", {"text"}),
        (parquet_rows, "pictures", {"text", "image"}),
        (plain_text, "plain text", {"text"}),
        (dotted_keys, "raw form", {"text", "image"}),
        (interleaved, "OBELICS, MMC4", {"text", "image"}),
    ],
)
def test_the_table_that_is_printed_tokenizes_every_sample(
    write: Callable[[Path], None], name: str, modalities: set[str], tokenizers: Path, tmp_path: Path
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw)
    page = look(str(raw))
    assert name in page and f"documents: {COUNT} of {COUNT} samples can be used" in page
    pasted = page.partition("data.toml for it:\n")[2].partition("\ndocuments:")[0]
    assert tomllib.loads(pasted)
    source = "[source]" + pasted.partition("[source]")[2]
    assert {modality for modality in ("text", "image", "speech") if f"[{modality}]\n" in pasted} >= modalities
    config = tmp_path / "data.toml"
    config.write_text(f'tokenizers_from = "{tokenizers}"\nmax_bad_frac = 0.0\n{source}\n')
    manifest = tokenize(raw, tmp_path / "out", config_path=config, processes=1)[""]
    assert manifest["num_documents"] == COUNT
    assert {name for name, count in manifest["tokens"].items() if count} == modalities
    assert TokenSource.open(tmp_path / "out").num_documents == COUNT


def test_what_would_be_lost_is_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = {}
    for n in range(COUNT):
        content = b"no picture" if n % 6 == 0 else png(picture(n))
        members |= {f"{n:04}.jpg": content, f"{n:04}.txt": b"\xff\xff" if n == 1 else b"text"}
    write_tar(tmp_path / "a.tar", members)
    assert main(["look", str(tmp_path)]) == 0
    page = capsys.readouterr().out
    assert "documents: 19 of 24 samples can be used" in page
    assert "lost 4, such as 0000: the picture cannot be decoded" in page
    assert 'lost 1, such as 0001: the text at "txt" is not UTF-8' in page
    assert "image 66" in page


def test_names_from_data_are_shown_escaped(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.a\x1b[2J\nlayout: fine": b"", "0.json": b'{"b\\u001b[2J": "x"}'})
    page = look(str(tmp_path))
    assert "\x1b" not in page and "\nlayout: fine" not in page and r"\x1b[2J" in page
    assert "layout: not known" in page


def test_places_without_raw_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it holds nothing"):
        look(str(tmp_path))
