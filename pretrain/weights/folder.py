"""A folder of weights: whole tensors in safetensors files, under names that do not depend on a layout.

    model.json                       model, run, step, vocabulary, thresholds; bytes and SHA-256 of files
    model.safetensors                the tensors; or several files with an index:
    model-00001-of-00002.safetensors ...
    model.safetensors.index.json

Names are those of the one-process Decoder, such as `blocks.0.attention.qkv.weight.image`. A folder in the
layout of Hugging Face has config.json instead of model.json, and other names. Importing this module imports
no torch, because names, shapes and digests are checked before any rank starts.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from safetensors import SafetensorError, safe_open

from data_pipeline.files.atomic import atomic_folder, usual_mode, write_json
from data_pipeline.files.os_errors import naming
from data_pipeline.files.printable import first_names
from data_pipeline.files.toml_config import ConfigError, load_toml, validate
from pretrain.checkpoint.folder import file_digest, seal, synced_file_digest
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import logical_shapes
from pretrain.models.routing_state import RoutingState
from pretrain.train import depth_steps, expert_steps

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 2
"""The format of model.json that is written. Format 1, which is read too, has no "routers"."""
MODEL, INDEX, SINGLE = "model.json", "model.safetensors.index.json", "model.safetensors"
Dtype = Literal["fp32", "bf16"]
_BYTES: dict[Dtype, int] = {"fp32": 4, "bf16": 2}
_FLOATS = ("F32", "BF16", "F16")
"""Element types of safetensors that can be read; files with other types hold quantised weights or none."""
_SHOWN = 4
"""Number of names that a message lists."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is needed; the result may be a view of a memory-mapped file."""

    shape: tuple[int, ...]
    read: Callable[[], "Tensor"]


Tensors = Mapping[str, LazyTensor]


@dataclass(frozen=True)
class WeightSource:
    """Weights of any origin, with the model that they belong to."""

    path: Path
    model: ModelConfig
    tensors: Tensors
    name: str
    """Name of the run or the model."""
    step: int | None = None
    vocabulary: Mapping[str, int] | None = None
    """Number of ids per modality, in order; None if it is not known."""
    special_tokens: Mapping[str, int] | None = None
    """Ids of special tokens; None: they are the first ids, or not known."""
    tokenizers: Mapping[str, str] | None = None
    """Modality -> fingerprint of the tokenizer that made its ids; None if they are not known."""
    routing_state: RoutingState | None = None
    """Thresholds of routers and the progress of the run, in the form of training; None if they are not
    known."""


class _Routers(BaseModel):
    """ "routers" of model.json: what a RoutingState holds of a trained model."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    thresholds: dict[str, FiniteFloat]
    progress: float = Field(ge=0, le=1)
    sha256: str
    """Of the other fields: a changed digit would choose other tokens, and nothing else would tell."""


def threshold_names(model: ModelConfig) -> frozenset[str]:
    """Names of all routers and experts of a model that may choose tokens by a threshold."""
    experts = (
        name
        for router, (_, tower) in expert_steps.routers(model).items()
        if not model.experts[tower].causal
        for name in expert_steps.expert_names(router, model.experts[tower])
    )
    return frozenset((*depth_steps.routers(model), *experts))


def lacks_thresholds(source: WeightSource) -> bool:
    """Whether the model has routers that could choose by thresholds, and the weights come without them."""
    return source.routing_state is None and bool(threshold_names(source.model))


def check_tensors(path: Path, tensors: Tensors, expected: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ConfigError unless `tensors` have exactly the `expected` names and shapes.

    `what` names the model that they are checked for.
    """
    reshaped = [name for name, shape in expected.items() if name in tensors and tensors[name].shape != shape]
    problems = {
        "missing": [name for name in expected if name not in tensors],
        "not part of it": [name for name in tensors if name not in expected],
        "of another shape": [
            f"{n} {list(tensors[n].shape)} instead of {list(expected[n])}" for n in reshaped
        ],
    }
    if lists := [_listed(problem, names) for problem, names in problems.items() if names]:
        raise ConfigError(f"{path} does not hold the tensors of {what}: {'; '.join(lists)}")


def open_weights(folder: Path) -> WeightSource:
    """Open a folder of weights and check its headers. Raises ConfigError.

    `find_corruption` checks the content.
    """
    about = read_about(folder)
    model = validate(ModelConfig, about["model"], source=f"{folder / MODEL}: model")
    tensors = read_tensors(folder)
    check_tensors(folder, tensors, logical_shapes(model), f"its own {MODEL}")
    state = _routing_state(folder, about.get("routers"), model)
    ids = about["vocabulary"], about.get("special_tokens"), about.get("tokenizers")
    return WeightSource(folder, model, tensors, about["name"], about["step"], *ids, state)


def _routing_state(folder: Path, routers: Any, model: ModelConfig) -> RoutingState | None:
    """The content of "routers" in model.json; None where there is none. Raises ConfigError."""
    if routers is None:
        return None
    found = validate(_Routers, routers, source=f"{folder / MODEL}: routers")
    if unknown := sorted(found.thresholds.keys() - threshold_names(model)):
        raise ConfigError(
            f"{folder / MODEL}: routers: {_listed('thresholds of no router of the model', unknown)}; was it "
            "edited? Export the weights again"
        )
    if seal(routers) != routers:
        raise ConfigError(f"{folder / MODEL}: routers: changed (SHA-256 differs); copy or export it again")
    return RoutingState(thresholds=found.thresholds, progress=found.progress)


def read_about(folder: Path) -> dict[str, Any]:
    """The content of model.json. Raises ConfigError if it is not what an export writes."""
    about = load_toml(folder / MODEL)
    needed = {"name", "step", "vocabulary", "model", "files"}
    if about.get("format") == FORMAT:
        needed.add("routers")
    if about.get("format") not in (1, FORMAT) or not needed <= about.keys():
        raise ConfigError(
            f"{folder / MODEL}: no description of weights of format 1 or {FORMAT}; export them again"
        )
    optional = (about.get(key) for key in ("vocabulary", "special_tokens", "tokenizers", "routers"))
    tables = isinstance(about["files"], dict) and all(isinstance(table, dict | None) for table in optional)
    unlisted = {path.name for path in folder.glob("*.safetensors")} - set(about["files"] if tables else ())
    if not tables or unlisted:
        raise ConfigError(
            f"{folder / MODEL}: its files, vocabulary or routers are not what an export writes"
            + (f" (it does not list {_listed('files', sorted(unlisted))})" if unlisted else "")
            + "; was it edited? Export the weights again"
        )
    return about


def digest(folder: Path) -> str:
    """SHA-256 over the model and files in model.json; it is equal for equal weights."""
    about = read_about(folder)
    content = json.dumps({"model": about["model"], "files": about["files"]}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def find_corruption(folder: Path, share: slice = slice(None)) -> list[str]:
    """The problems of a share of the files, whose content is read and hashed; [] if there are none."""
    return [
        f"{folder / name}: its content has changed (SHA-256 differs); copy or export it again"
        for name, entry in list(read_about(folder)["files"].items())[share]
        if file_digest(folder / name) != entry
    ]


def read_tensors(folder: Path) -> dict[str, LazyTensor]:
    """All tensors of a folder with one or several safetensors files.

    Raises ConfigError for a file that is missing, truncated or quantised.
    """
    index = folder / INDEX
    file_of = load_toml(index).get("weight_map", {}) if index.exists() else {}
    if not file_of and not (folder / SINGLE).exists():
        raise ConfigError(
            f"{folder}: neither {SINGLE} nor a weight_map in {INDEX} is there; older files such as "
            "pytorch_model.bin are not read: save the model again with safe_serialization=True"
        )
    headers = {name: _header(folder / name) for name in sorted(set(file_of.values())) or [SINGLE]}
    actual = {tensor: name for name, header in headers.items() for tensor in header}
    if file_of and (wrong := sorted(t for t in {**file_of, **actual} if file_of.get(t) != actual.get(t))):
        raise ConfigError(f"{index} and its files disagree: {_listed('tensors', wrong)}")
    return {
        tensor: LazyTensor(shape, partial(_read, folder / name, tensor))
        for name, header in headers.items()
        for tensor, shape in header.items()
    }


def write_folder(
    out: Path, source: WeightSource, description: Mapping[str, Any], *, dtype: Dtype, file_bytes: int
) -> list[Path]:
    """Write the tensors of `source` into a new folder, whole or not at all; returns its files.

    `description`: JSON values by file name; "files" and "dtype" are added to model.json. The tensors of one
    file are held in memory at a time: at most `file_bytes`, or one tensor.
    """
    check_out(out, source.path)
    sizes = {name: _BYTES[dtype] * math.prod(tensor.shape) for name, tensor in source.tensors.items()}
    files, entries = _cut_into_files(sizes, file_bytes), {}
    try:
        with atomic_folder(out) as writing:
            for name, tensors in files.items():
                with naming(writing / name):
                    of_file = {tensor: source.tensors[tensor] for tensor in tensors}
                    _write_file(writing / name, of_file, dtype)
                    entries[name] = synced_file_digest(writing / name)
            if len(files) > 1:
                file_of = {tensor: name for name, tensors in files.items() for tensor in tensors}
                index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
                write_json(writing / INDEX, index)
            for name, value in description.items():
                more = {"dtype": dtype, "files": entries} if name == MODEL else {}
                write_json(writing / name, {**value, **more})
    except (OSError, SafetensorError) as error:  # SafetensorError wraps the message of an OSError
        raise ConfigError(f"{out}: cannot be written: {error}") from None
    return sorted(out.iterdir())


def about_model(source: WeightSource) -> dict[str, Any]:
    """The content of model.json for weights, without their files."""
    origin = {"name": source.name, "step": source.step, "vocabulary": source.vocabulary}
    known = {"special_tokens": source.special_tokens, "tokenizers": source.tokenizers}
    origin |= {key: table for key, table in known.items() if table is not None}
    state, routers = source.routing_state, None
    if state is not None and threshold_names(source.model):
        routers = seal({"thresholds": dict(state.thresholds), "progress": state.progress})
    model = source.model.model_dump(mode="json")
    return {"format": FORMAT, **origin, "routers": routers, "model": model}


def check_out(out: Path, source: Path) -> None:
    """Raise ConfigError if the new folder exists, or would be inside its own source."""
    if out.exists():
        raise ConfigError(f"{out} exists; choose another folder, or remove it")
    if source.resolve() in out.resolve().parents:
        raise ConfigError(f"{out} is inside {source}, its source; choose a folder beside it")


def _write_file(path: Path, tensors: Tensors, dtype: Dtype) -> None:
    import torch
    from safetensors.torch import save_file

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    # Tensors are copied, since save_file refuses tensors that share memory, as views of a file may.
    copies = {
        name: torch.empty(tensor.shape, dtype=kind).copy_(tensor.read()) for name, tensor in tensors.items()
    }
    with usual_mode(path):
        save_file(copies, path, metadata={"format": "pt"})  # transformers refuses files without this


def _cut_into_files(sizes: Mapping[str, int], file_bytes: int) -> dict[str, list[str]]:
    """By file name, the names of its tensors, in order; no tensor is split."""
    groups, filled = [[]], 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > file_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def _header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors. Raises ConfigError for a truncated or quantised file."""
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            types = {name: tensor.get_dtype() for name, tensor in slices.items()}
            shapes = {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path}: missing, cut short or no safetensors file ({error}); fetch or export it again "
            "(`git lfs pull`, if it is a pointer of git-lfs)"
        ) from None
    if odd := [f"{name} {kind}" for name, kind in types.items() if kind not in _FLOATS]:
        raise ConfigError(f"{path} is quantised or no model: {_listed('legal: F32, BF16, F16; found', odd)}")
    return shapes


def _read(path: Path, name: str) -> "Tensor":
    """One tensor of a file, memory-mapped, so that unused parts are not read (safetensors 0.8)."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _listed(what: str, items: list[str]) -> str:
    """ "what: a, b, c and 5 more"."""
    return f"{what}: {first_names(items, _SHOWN)}"
