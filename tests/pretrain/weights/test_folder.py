"""A folder of weights is whole, or told to be damaged before a tensor of it is used."""

import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from data_pipeline.files.toml_config import ConfigError
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from pretrain.weights.folder import (
    INDEX,
    MODEL,
    SINGLE,
    LazyTensor,
    WeightSource,
    about_model,
    digest,
    find_corruption,
    lacks_thresholds,
    open_weights,
    read_tensors,
    threshold_names,
    write_folder,
)
from tests.pretrain.models.random_batch import MOT, depth_tables, tiny_config


def drawn(folder: Path, *, seed: int = 1, **changes: object) -> WeightSource:
    """Weights of a tiny decoder, as a source that lies nowhere."""
    config = tiny_config(MOT, **changes)
    tensors = {
        name: LazyTensor(tuple(p.shape), p.detach)
        for name, p in Decoder(config, seed=seed).named_parameters()
    }
    return WeightSource(folder / "nowhere", config, tensors, "tiny", 7, {"text": 30, "image": 6, "speech": 4})


def write(source: WeightSource, out: Path, *, dtype="fp32", file_bytes: int = 20_000) -> Path:
    write_folder(out, source, {MODEL: about_model(source)}, dtype=dtype, file_bytes=file_bytes)
    return out


@pytest.mark.parametrize("file_bytes", [1, 20_000, 10**9])
def test_what_was_written_is_read(tmp_path: Path, file_bytes: int) -> None:
    source = drawn(tmp_path)
    opened = open_weights(write(source, tmp_path / "out", file_bytes=file_bytes))
    assert (opened.model, opened.name, opened.step) == (source.model, "tiny", 7)
    assert opened.vocabulary == source.vocabulary and list(opened.vocabulary) == list(source.vocabulary)
    assert opened.tensors.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        assert opened.tensors[name].shape == tensor.shape
        assert torch.equal(opened.tensors[name].read(), tensor.read())
    assert find_corruption(tmp_path / "out") == []
    assert not list(tmp_path.glob("writing.*"))


ROUTED: dict[str, Any] = {
    **depth_tables(["image"], schedule="constant", mean_ratio=0.5, rule="top_k"),
    "experts": {"text": {"num_experts": 2}},
}


def test_thresholds_of_routers_come_along(tmp_path: Path) -> None:
    """Bit for bit, through a folder of a folder; a folder of format 1 opens, and lacks them."""
    thresholds = {"blocks.0.depth.image": 0.1 + 2e-9, "blocks.1.experts.text.1": -1 / 3}
    state = RoutingState(thresholds=thresholds, progress=0.7)
    source = replace(drawn(tmp_path, **ROUTED), routing_state=state)
    opened = open_weights(write(open_weights(write(source, tmp_path / "a")), tmp_path / "b"))
    assert opened.routing_state == state and not lacks_thresholds(opened)
    assert threshold_names(source.model) == {
        *(f"blocks.{layer}.depth.image" for layer in range(2)),
        *(f"blocks.{layer}.experts.text.{expert}" for layer in range(2) for expert in range(2)),
    }
    _edit_json(MODEL, lambda v: (v.update(format=1), v.pop("routers")))(tmp_path / "b")
    old = open_weights(tmp_path / "b")
    assert old.routing_state is None and lacks_thresholds(old)
    assert open_weights(write(old, tmp_path / "c")).routing_state is None
    dense = open_weights(write(replace(drawn(tmp_path), routing_state=state), tmp_path / "d"))
    assert dense.routing_state is None and not lacks_thresholds(dense)


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        ({"thresholds": {"blocks.0.depth.speech": 0.0}}, "of no router of the model"),
        ({"progress": 2.0}, "progress"),
        ({"thresholds": {"blocks.0.depth.image": "x"}}, "thresholds.blocks.0.depth.image"),
        ({"thresholds": {"blocks.0.depth.image": 0.3}}, "routers: changed (SHA-256 differs)"),
        ({"progress": 0.5}, "routers: changed (SHA-256 differs)"),
        ([], "routers are not what an export writes"),
    ],
)  # fmt: skip
def test_thresholds_that_no_export_wrote_are_told(tmp_path: Path, routers: Any, message: str) -> None:
    state = RoutingState(thresholds={"blocks.0.depth.image": 0.2})
    out = write(replace(drawn(tmp_path, **ROUTED), routing_state=state), tmp_path / "out")
    changed = routers if isinstance(routers, list) else about_model(open_weights(out))["routers"] | routers
    _edit_json(MODEL, lambda v: v.update(routers=changed))(out)
    with pytest.raises(ConfigError, match=re.escape(message)):
        open_weights(out)


def test_files_are_no_larger_than_asked(tmp_path: Path) -> None:
    out = write(drawn(tmp_path), tmp_path / "out", file_bytes=20_000)
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    headers = 4_000  # names and shapes of about 20 tensors; file_bytes is of tensors
    assert all(file.stat().st_size < 20_000 + headers for file in files)
    assert set(json.loads((out / INDEX).read_text())["weight_map"].values()) == {f.name for f in files}


def test_bf16_is_rounded_once(tmp_path: Path) -> None:
    source = drawn(tmp_path)
    opened = open_weights(write(source, tmp_path / "out", dtype="bf16"))
    for name, tensor in source.tensors.items():
        assert torch.equal(opened.tensors[name].read(), tensor.read().bfloat16())


def test_digest_is_of_the_weights_not_of_their_story(tmp_path: Path) -> None:
    source = drawn(tmp_path)
    same = WeightSource(source.path, source.model, source.tensors, "another name", None, None)
    first = digest(write(source, tmp_path / "a"))
    assert digest(write(same, tmp_path / "b")) == first
    assert digest(write(drawn(tmp_path, seed=2), tmp_path / "c")) != first
    assert digest(write(drawn(tmp_path, rope_theta=500.0), tmp_path / "d")) != first


def test_a_view_of_a_file_reads_only_what_is_used(tmp_path: Path) -> None:
    """A rank of many maps the whole file; what it does not cut out must not be read."""
    big = LazyTensor((1 << 14, 1 << 10), lambda: torch.ones(1 << 14, 1 << 10))  # 64 MiB
    source = drawn(tmp_path)
    write_folder(
        tmp_path / "out",
        WeightSource(source.path, source.model, {"big": big}, "tiny"),
        {},
        dtype="fp32",
        file_bytes=1,
    )

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    rows = read_tensors(tmp_path / "out")["big"].read()[:16].clone()
    # 64 KiB of rows; the kernel maps pages around a fault, safetensors itself takes 2 MiB.
    assert torch.equal(rows, torch.ones(16, 1 << 10)) and resident() - before < 16 << 20


def _edit_json(name: str, edit: Callable[[dict], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value))

    return change


def _cut(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])


def _first(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


DAMAGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no model.json": (lambda f: (f / MODEL).unlink(), [f"{MODEL}: no such file"]),
    "a file is missing": (lambda f: _first(f).unlink(), ["model-00001-of-", "missing", "export it again"]),
    "a file is cut short": (_cut, ["model-00002-of-", "cut short", "fetch or export it again"]),
    "another format": (_edit_json(MODEL, lambda v: v.update(format=9)), [MODEL, "format 1 or 2"]),
    "model.json is not JSON": (lambda f: (f / MODEL).write_text("{"), [f"{MODEL}: not valid JSON"]),
    "model.json lists no files": (
        _edit_json(MODEL, lambda v: v.update(files={})),
        [MODEL, "does not list"],
    ),
    "its vocabulary is a number": (
        _edit_json(MODEL, lambda v: v.update(vocabulary=5)),
        [MODEL, "was it edited"],
    ),
    "model.json lost a key": (_edit_json(MODEL, lambda v: v.pop("files")), [MODEL, "export them again"]),
    "index names a tensor that is nowhere": (
        _edit_json(INDEX, lambda v: v["weight_map"].update(more=next(iter(v["weight_map"].values())))),
        [INDEX, "disagree: tensors: more"],
    ),
    "index leaves a tensor out": (
        _edit_json(INDEX, lambda v: v["weight_map"].pop("head.weight.shared")),
        [INDEX, "disagree: tensors: head.weight.shared"],
    ),
    "index names a file that is not there": (
        _edit_json(INDEX, lambda v: v["weight_map"].update(more="model-9.safetensors")),
        ["model-9.safetensors: missing"],
    ),
    "index is empty": (lambda f: (f / INDEX).write_text("{}"), ["nor a weight_map", INDEX]),
    "no index": (lambda f: (f / INDEX).unlink(), [f"neither {SINGLE} nor", INDEX]),
    "model of another shape": (
        _edit_json(MODEL, lambda v: v["model"].update(ffn_hidden=32)),
        ["of another shape: blocks.0.feed_forward.gate_up.weight.text [48, 16] instead of [64, 16]", "and "],
    ),
    "model with more layers": (
        _edit_json(MODEL, lambda v: v["model"].update(num_layers=3)),
        ["missing: blocks.2.attention.qkv.weight.text"],
    ),
    "model with fewer layers": (
        _edit_json(MODEL, lambda v: v["model"].update(num_layers=1)),
        ["not part of it: blocks.1."],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_is_told_from_headers_alone(tmp_path: Path, case: str) -> None:
    edit, expected = DAMAGES[case]
    out = write(drawn(tmp_path), tmp_path / "out")
    edit(out)
    with pytest.raises(ConfigError) as error:
        open_weights(out)
    for part in expected:
        assert part in str(error.value), error.value


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    out = write(drawn(tmp_path), tmp_path / "out")
    data = bytearray(_first(out).read_bytes())
    data[-1] ^= 1
    _first(out).write_bytes(data)
    open_weights(out)
    (problem,) = find_corruption(out)
    assert _first(out).name in problem and "SHA-256" in problem
    assert find_corruption(out, slice(1, None, 2)) == []


def _file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


INT8 = b'{"w": {"dtype": "I8", "shape": [2], "data_offsets": [0, 2]}}'
NOT_SAFETENSORS = {
    "git-lfs pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "git lfs pull",
    ),
    "html page": (b"<html>" + b"x" * 4000, "no safetensors file"),
    "empty": (b"", "cut short"),
    "header of junk": (_file(b"x" * 50, b""), "no safetensors file"),
    "quantised": (_file(INT8, b"ab"), "quantised or no model: legal: F32, BF16, F16; found: w I8"),
    "cut by a byte": (_file(INT8, b"a"), "cut short"),
}


@pytest.mark.parametrize("case", NOT_SAFETENSORS)
def test_what_is_no_safetensors_file_is_told(tmp_path: Path, case: str) -> None:
    content, expected = NOT_SAFETENSORS[case]
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as error:
        read_tensors(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / SINGLE}")


def test_older_files_of_weights_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin are not read.*safe_serialization"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("error", [OSError, SafetensorError])
def test_nothing_half_written_stays(tmp_path: Path, error: type[Exception]) -> None:
    source = drawn(tmp_path)
    tensors = dict(source.tensors)

    def full() -> torch.Tensor:
        raise error("No space left on device")

    name = list(tensors)[-1]
    tensors[name] = LazyTensor(tensors[name].shape, full)
    with pytest.raises(ConfigError, match=r"out: cannot be written: .*No space left"):
        write(WeightSource(source.path, source.model, tensors, "tiny"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "writing.out").mkdir()
    (tmp_path / "writing.out" / "model-00007-of-00009.safetensors").touch()
    out = write(drawn(tmp_path), tmp_path / "out")
    assert not (out / "model-00007-of-00009.safetensors").exists() and not list(tmp_path.glob("writing.*"))


def test_an_existing_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="out exists; choose another folder"):
        write(drawn(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_weights_are_looked_at_where_nothing_can_be_brought_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only squashfs, whose files refuse fsync with EINVAL."""
    out = write(drawn(tmp_path), tmp_path / "out")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    assert find_corruption(out) == []
