import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from random import Random

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from data_pipeline.shards.tar import ShardError, Url, write_shard
from data_pipeline.tokenize.layout import RAW, SourceSettings
from data_pipeline.tokenize.readers import kind_of, read_raw

MOST = 1 << 20
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def read(
    path: Path, source: SourceSettings = RAW, most: int = MOST
) -> list[tuple[str, dict[str, bytes | None]]]:
    return [(key, dict(sample)) for key, sample in read_raw(path, source, most)]


def refusal(path: Path, source: SourceSettings = RAW) -> str:
    with pytest.raises(ShardError) as error:
        read(path, source)
    assert str(error.value).startswith(str(path))
    return str(error.value)


def tar_of(*names: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(name)
            tar.addfile(info, io.BytesIO(name.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar"])
def test_a_tar_is_read_whether_it_is_compressed_or_not_whatever_its_name(tmp_path: Path, name: str) -> None:
    plain = tar_of("0.jpg", "0.txt", "1.jpg", "1.txt")
    expected = [(k, {e: f"{k}.{e}".encode() for e in ("jpg", "txt")}) for k in ("0", "1")]
    (tmp_path / name).write_bytes(gzip.compress(plain))
    assert read(tmp_path / name) == expected
    for cut in (20, 60, len(gzip.compress(plain)) - 4):
        (tmp_path / name).write_bytes(gzip.compress(plain)[:cut])
        assert "truncated or damaged" in refusal(tmp_path / name) or "cannot be read" in refusal(
            tmp_path / name
        )
    (tmp_path / name).write_bytes(plain)
    assert read(tmp_path / name) == expected


def test_keys_with_dots_end_where_an_ending_begins(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar_of(
            "./d.d/v1.5_0.json", "./d.d/v1.5_0.0.jpg", "./d.d/v1.5_1.json", "./d.d/v1.5_1.0.JPG", "x.y.txt"
        )
    )
    found = read(tmp_path / "a.tar", SourceSettings(keys_with_dots=True))
    assert [(key, sorted(sample)) for key, sample in found] == [
        ("./d.d/v1.5_0".replace(".", "%2E"), ["0.jpg", "json"]),
        ("./d.d/v1.5_1".replace(".", "%2E"), ["0.JPG", "json"]),
        ("x%2Ey", ["txt"]),
    ]
    declared = SourceSettings(keys_with_dots=True, parts=({"image": "0.jpg"},))
    (tmp_path / "b.tar").write_bytes(tar_of("v1.5.0.jpg", "v1.5.json", "v1.6.0.JPG", "v1.6.json"))
    assert [sorted(sample) for _, sample in read(tmp_path / "b.tar", declared)] == [
        ["0.jpg", "json"],
        ["0.JPG", "json"],
    ]


@given(rows=st.lists(st.dictionaries(st.text(), VALUES, max_size=3), max_size=8), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_rows_come_back_from_lines_and_lists(
    tmp_path_factory: pytest.TempPathFactory, rows: list, seed: int
) -> None:
    """Lists are read in chunks: their text is laid out with odd white space, and characters of many bytes."""
    folder, random = tmp_path_factory.mktemp("rows"), Random(seed)
    ascii_only, indent = random.random() < 0.5, random.choice([None, 0, 3])
    (folder / "a.json").write_text(json.dumps(rows, ensure_ascii=ascii_only, indent=indent))
    lines = [json.dumps(row) + random.choice(["\n", "\r\n", "\n\n"]) for row in rows]
    (folder / "b.jsonl").write_text("".join(lines))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (folder / "d.json").write_text("".join(lines))
    for path in sorted(folder.iterdir()):
        found = read(path)
        assert [json.loads(sample["json"] or b"") for _, sample in found] == rows
        assert [key for key, _ in found] == [f"{path.name[0]}-{number:09}" for number in range(len(rows))]


def test_a_list_of_many_chunks_is_read_element_by_element(tmp_path: Path) -> None:
    rows = [{"number": n, "text": "\u00e9\u4e16" * 40_000} for n in range(12)]
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert [json.loads(sample["json"] or b"") for _, sample in read(tmp_path / "a.json")] == rows


def test_what_is_too_large_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": "' + "x" * 5000 + '"}\n{"a": 2}\n')
    assert [sample["json"] for _, sample in read(tmp_path / "a.jsonl", most=100)] == [
        b'{"a": 1}',
        None,
        b'{"a": 2}',
    ]
    (tmp_path / "a.txt").write_text("x" * 5000)
    assert read(tmp_path / "a.txt", most=100) == [("a", {"txt": None})]
    (tmp_path / "b.png").write_bytes(bytes(5000))
    (tmp_path / "b.jsonl").write_text('{"image": "b.png"}\n')
    source = SourceSettings(parts=({"image": "file:image"},))
    ((_, sample),) = read(tmp_path / "b.jsonl", source, 100)
    assert sample["file:b.png"] is None


def test_files_that_rows_name_are_read_from_their_folder_alone(tmp_path: Path) -> None:
    folder = tmp_path / "raw" / "images"
    folder.mkdir(parents=True)
    (folder / "a.jpg").write_bytes(b"A")
    (tmp_path / "secret").write_bytes(b"S")
    os.mkfifo(folder / "pipe")
    names = ["a.jpg", "../../secret", str(tmp_path / "secret"), "pipe", "none", "x" * 5000, "a\nb", ""]
    (tmp_path / "raw" / "a.json").write_text(json.dumps([{"image": name} for name in names]))
    found = read(
        tmp_path / "raw" / "a.json", SourceSettings(parts=({"image": "file:image"},), folder="images")
    )
    assert [{k: v for k, v in sample.items() if k != "json"} for _, sample in found] == [
        {"file:a.jpg": b"A"}, *[{}] * (len(names) - 1),
    ]  # fmt: skip


def test_text_is_a_document_a_file_or_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.b.txt").write_text("one\n\ntwo\r\nthree")
    assert read(tmp_path / "a.b.txt") == [("a%2Eb", {"txt": b"one\n\ntwo\r\nthree"})]
    found = read(tmp_path / "a.b.txt", SourceSettings(documents="line"))
    assert [sample["txt"] for _, sample in found] == [b"one", b"two", b"three"]


def test_columns_of_bytes_are_members_and_others_the_json(tmp_path: Path) -> None:
    rows = [
        {
            "text": f"t{n}",
            "image": {"bytes": b"%d" % n, "path": None},
            "images": [{"bytes": b"x"}] * n,
            "n": n,
        }
        for n in range(1, 40)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    found = read(tmp_path / "a.parquet")
    assert len(found) == 39
    for n, (key, sample) in enumerate(found, 1):
        assert key == f"a-{n - 1:09}" and sample["image"] == b"%d" % n and sample[f"images.{n - 1}"] == b"x"
        assert json.loads(sample["json"] or b"") == {"text": f"t{n}", "n": n}
    assert set(read(tmp_path / "a.parquet", most=10)[0][1].values()) == {None}
    content = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", content[:-30], content[: len(content) // 2], bytes(len(content))):
        (tmp_path / "a.parquet").write_bytes(damaged)
        assert "no Parquet, or damaged" in refusal(tmp_path / "a.parquet")
    with pytest.raises(ShardError, match="from local folders only"):
        list(read_raw(Url("https://host/a.parquet"), RAW, MOST))


@pytest.mark.parametrize("text", ["[1, 2", "[{]", "[" * 100_000, '["a" "', "[tru]"])
def test_lists_that_are_none_are_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    assert "no JSON, or damaged" in refusal(tmp_path / "a.json")


def test_files_of_other_kinds_and_places_are_refused(tmp_path: Path) -> None:
    assert kind_of("A.TAR.GZ") == "tar" and kind_of("a.jpg") is None
    os.mkfifo(tmp_path / "a.jsonl")
    assert "not a regular file" in refusal(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b\x08\0\0\0\0\0\0\0abc")
    assert "damaged" in refusal(tmp_path / "b.jsonl.gz")
    write_shard(tmp_path / "c.tar", [("0", {"txt": b""})])
    assert read(tmp_path / "c.tar") == [("0", {"txt": b""})]
