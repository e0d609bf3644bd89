"""A folder of weights: whole tensors under names that no layout changes, in safetensors files.

    model.json                       model, run, step, vocabulary; bytes and SHA-256 of each file
    model.safetensors                the tensors; or several, and which holds which:
    model-00001-of-00002.safetensors ...
    model.safetensors.index.json

Names are those of the one-process Decoder: `blocks.0.attention.qkv.weight.image`. A folder in the layout of
Hugging Face is the same with a config.json for the model.json and other names. Importing this file imports no
torch: headers of safetensors files are JSON, and are checked before any rank starts.
"""

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from data_pipeline.shards import write_json
from data_pipeline.toml_config import ConfigError, validate
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import logical_shapes

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
MODEL, INDEX, SINGLE = "model.json", "model.safetensors.index.json", "model.safetensors"
Dtype = Literal["fp32", "bf16"]
FLOATS = ("F32", "BF16", "F16")
"""Types of safetensors that are read; others hold quantised weights or no weights."""
_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_SHOWN = 4
"""Names that a message lists."""


@dataclass(frozen=True)
class Lazy:
    """A tensor that is read when it is needed; what is read may be a view of a mapped file."""

    shape: tuple[int, ...]
    read: Callable[[], "Tensor"]


Tensors = Mapping[str, Lazy]


@dataclass(frozen=True)
class Source:
    """Weights with what they mean, wherever they come from."""

    path: Path
    model: ModelConfig
    tensors: Tensors
    name: str
    """Of the run or the model."""
    step: int | None = None
    vocabulary: Mapping[str, int] | None = None
    """Ids per modality, in their order, where they are known."""


def check_tensors(path: Path, found: Tensors, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ConfigError unless exactly the `expected` tensors are there, in their shapes."""
    problems = [
        _listed("missing", [name for name in expected if name not in found]),
        _listed("not part of it", [name for name in found if name not in expected]),
        _listed(
            "of another shape",
            [
                f"{name} {list(found[name].shape)} instead of {list(shape)}"
                for name, shape in expected.items()
                if name in found and found[name].shape != shape
            ],
        ),
    ]
    if any(problems):
        raise ConfigError(f"{path} does not hold the tensors of {what}: {'; '.join(filter(None, problems))}")


def open_weights(folder: str | Path) -> Source:
    """A folder of ours, every header and size checked. Raises ConfigError; see `verify` for the content."""
    path, about = Path(folder), read_about(folder)
    model = validate(ModelConfig, about["model"], source=f"{path / MODEL}: model")
    for name, entry in about["files"].items():
        if not (path / name).is_file():
            raise ConfigError(f"{path / name}: missing, but {MODEL} names it; copy the whole folder again")
        if (size := (path / name).stat().st_size) != entry["bytes"]:
            raise ConfigError(
                f"{path / name}: {size} bytes, but {MODEL} says {entry['bytes']}; copy it again"
            )
    tensors = read_tensors(path)
    check_tensors(path, tensors, logical_shapes(model), f"its own {MODEL}")
    return Source(path, model, tensors, about["name"], about["step"], about["vocabulary"])


def read_about(folder: str | Path) -> dict[str, Any]:
    """What model.json says."""
    path = Path(folder) / MODEL
    if not path.is_file():
        raise ConfigError(
            f"{folder}: no {MODEL}, so it is no folder of weights (paths are relative to {Path.cwd()}); "
            "`motley export` and `motley import` write one"
        )
    about = _json(path)
    wanted = {"format", "name", "step", "vocabulary", "model", "files"}
    if not isinstance(about, dict) or not wanted <= about.keys() or about["format"] != FORMAT:
        raise ConfigError(f"{path}: not a description of weights of format {FORMAT}; export them again")
    return about


def digest(folder: str | Path) -> str:
    """SHA-256 over what model.json says of model and files: equal for equal weights."""
    about = read_about(folder)
    told = json.dumps({"model": about["model"], "files": about["files"]}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def damage(folder: str | Path, share: slice = slice(None)) -> list[str]:
    """What is wrong with the content of a share of the files; reads them."""
    files = list(read_about(folder)["files"].items())[share]
    return [
        f"{Path(folder) / name}: its content has changed (SHA-256 differs); copy or export it again"
        for name, entry in files
        if _sha256(Path(folder) / name) != entry["sha256"]
    ]


def read_tensors(folder: Path) -> dict[str, Lazy]:
    """All tensors of a folder of one or several safetensors files. Raises ConfigError for what is missing,
    cut short, or quantised."""
    index = folder / INDEX
    if not index.is_file() and not (folder / SINGLE).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pth")))
        raise ConfigError(
            f"{folder}: neither {SINGLE} nor {INDEX} is there"
            + (f"; {others} is not read: save the model again with safe_serialization=True" * bool(others))
        )
    of_file = _json(index).get("weight_map") if index.is_file() else None
    if index.is_file() and not isinstance(of_file, dict):
        raise ConfigError(f"{index}: no weight_map in it; fetch it again")
    names = sorted(set(of_file.values())) if of_file else [SINGLE]
    headers = {name: _header(folder / name) for name in names}
    if of_file:
        held = {tensor: name for name, header in headers.items() for tensor in header}
        if wrong := [t for t in of_file.keys() | held.keys() if of_file.get(t) != held.get(t)]:
            raise ConfigError(f"{index} and its files disagree: {_listed('tensors', sorted(wrong))}")
    return {
        tensor: Lazy(tuple(entry["shape"]), partial(_read, folder / name, tensor))
        for name, header in headers.items()
        for tensor, entry in header.items()
    }


def write_folder(
    out: Path, source: Source, description: Mapping[str, Any], *, dtype: Dtype, file_bytes: int
) -> list[Path]:
    """Write `source`'s tensors into a new folder that is there whole or not at all; returns its files.

    `description`: file name -> what to write there as JSON; in model.json, "files" and "dtype" are added.
    Holds the tensors of one file in memory, at most `file_bytes` of them or one tensor.
    """
    check_out(out, source.path)
    writing = out.with_name(f"writing.{out.name}")
    sizes = {name: _BYTES[dtype] * math.prod(each.shape) for name, each in source.tensors.items()}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(out.parent).free) < sum(sizes.values()):
            raise ConfigError(f"{out}: {sum(sizes.values()):,} bytes to write, {free:,} free on its disk")
        shutil.rmtree(writing, ignore_errors=True)  # of a writer that was killed
        writing.mkdir()
        files = _cut_into_files(sizes, file_bytes)
        entries = {
            name: _write_file(writing / name, {t: source.tensors[t] for t in tensors}, dtype)
            for name, tensors in files.items()
        }
        if len(files) > 1:
            weight_map = {tensor: name for name, tensors in files.items() for tensor in tensors}
            metadata = {"total_size": sum(sizes.values())}
            write_json(writing / INDEX, {"metadata": metadata, "weight_map": weight_map})
        for name, value in description.items():
            more = {"dtype": dtype, "files": entries} if name == MODEL else {}
            write_json(writing / name, {**value, **more})
        os.rename(writing, out)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return sorted(out.iterdir())


def about_model(source: Source) -> dict[str, Any]:
    """model.json of weights, but for their files."""
    return {
        "format": FORMAT,
        "name": source.name,
        "step": source.step,
        "vocabulary": source.vocabulary,
        "model": source.model.model_dump(mode="json"),
    }


def check_out(out: Path, source: Path) -> None:
    """Raise ConfigError where a new folder cannot be, or would be inside what it is made of."""
    if out.exists():
        raise ConfigError(f"{out} exists; choose another folder, or remove it")
    if source.resolve() in out.resolve().parents:
        raise ConfigError(f"{out} is inside {source}, which it is made of; choose a folder beside it")


def _write_file(path: Path, tensors: Tensors, dtype: Dtype) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    # Copies: a tensor that is read may be a view, and one that two names share would not be written twice.
    own = {name: torch.empty(each.shape, dtype=kind).copy_(each.read()) for name, each in tensors.items()}
    save_file(own, path, metadata={"format": "pt"})  # transformers refuses files without this
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _cut_into_files(sizes: Mapping[str, int], file_bytes: int) -> dict[str, list[str]]:
    """File name -> tensors, in order, none split."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _read(path: Path, name: str) -> "Tensor":
    """Mapped, not loaded: what is not looked at is not read (safetensors 0.8, torch)."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _header(path: Path) -> dict[str, Any]:
    """Tensor -> its dtype and shape, from the head of a safetensors file: 8 bytes of length, then JSON."""
    if not path.is_file():
        raise ConfigError(f"{path}: missing; fetch or export the folder again")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            pointer = "; it is a pointer of git-lfs: run `git lfs pull`" if start == b"version " else ""
            raise ConfigError(f"{path}: cut short, or no safetensors file{pointer or '; fetch it again'}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{path}: no safetensors file (its header is damaged); fetch it again"
            ) from None
    if size != 8 + length + end:
        raise ConfigError(f"{path}: {size} bytes, but its header says {8 + length + end}; fetch it again")
    if odd := [f"{name} {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in FLOATS]:
        raise ConfigError(f"{path} is quantised or no model: {_listed('legal: F32, BF16, F16; found', odd)}")
    return header


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}; fetch or export it again") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(what: str, items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what}: {', '.join(items[:_SHOWN])}{more}" if items else ""
