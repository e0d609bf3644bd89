"""The tensor files of a checkpoint: writing and reading fragments of logical tensors, as safetensors."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data_pipeline.files.atomic import usual_mode
from parallel.digest import MODULUS, digests
from parallel.fragments import PARAMETER, Fragment
from parallel.logical import LogicalTensor
from pretrain.checkpoint.folder import MANIFEST, CheckpointError, shard_file

TensorEntries = dict[str, dict[str, Any]]
"""By name of a logical tensor: "shape", "dim", "blocks" (see LogicalTensor); "digest", 16 hex digits by kind;
"fragments", a list of {"file", "tp_rank", "tp_size", "start", "count"}, where "start" counts within the
tensor-parallel rank's part."""


class HostCopy:
    """Copies of the fragments that this rank saves, in one buffer of host memory that all saves share.

    A `take` overwrites the copies that the previous one returned.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.float32)

    def take(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copies of the fragments of replica 0, in fp32 on the host. Returns when they are complete."""
        own = [fragment for fragment in fragments if fragment.replica == 0]
        needed = sum(fragment.count * len(fragment.values) for fragment in own)
        on_gpu = any(value.is_cuda for fragment in own for value in fragment.values.values())
        if self._buffer.numel() < needed:
            self._buffer = self._buffer.new_empty(0)  # free it before the larger one is made
            self._buffer = torch.empty(needed, dtype=torch.float32, pin_memory=on_gpu)
        copies, end = [], 0
        for fragment in own:
            values = {}
            for kind, value in fragment.values.items():
                start, end = end, end + fragment.count
                values[kind] = self._buffer[start:end].copy_(value, non_blocking=True)
            copies.append(replace(fragment, values=values))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies


def write_shard(folder: Path, rank: int, fragments: Sequence[Fragment]) -> TensorEntries:
    """Write this rank's file; returns its share of the entries, with digests as numbers."""
    name = shard_file(rank)
    values = {_key(f.name, kind): value for f in fragments for kind, value in f.values.items()}
    with usual_mode(folder / name):
        save_file(values, folder / name)
    return {
        fragment.name: {
            "shape": list(fragment.logical.shape),
            "dim": fragment.logical.dim,
            "blocks": list(fragment.logical.blocks),
            "digest": digests(fragment),
            "fragments": [
                {
                    "file": name,
                    "tp_rank": fragment.tp_rank,
                    "tp_size": fragment.tp_size,
                    "start": fragment.start,
                    "count": fragment.count,
                }
            ],
        }
        for fragment in fragments
    }


def merge(shares: Sequence[TensorEntries]) -> TensorEntries:
    """The entries of the manifest from the shares of all ranks."""
    merged: TensorEntries = {}
    for share in shares:
        for name, entry in share.items():
            known = merged.setdefault(name, entry | {"digest": {}, "fragments": []})
            assert all(known[key] == entry[key] for key in ("shape", "dim", "blocks")), (name, known, entry)
            known["fragments"] += entry["fragments"]
            for kind, part in entry["digest"].items():
                known["digest"][kind] = (known["digest"].get(kind, 0) + part) % MODULUS
    for name, entry in merged.items():
        counts = [fragment["count"] for fragment in entry["fragments"]]
        assert sum(counts) == torch.Size(entry["shape"]).numel(), f"ranks hold {counts} elements of {name}"
        entry["digest"] = {kind: f"{value:016x}" for kind, value in entry["digest"].items()}
    return dict(sorted(merged.items()))


class ShardReader:
    """A reader of any range of any tensor, from the files that overlap it, which are memory-mapped."""

    def __init__(self, folder: Path, tensors: TensorEntries) -> None:
        self._folder, self._tensors = folder, tensors
        self._files: dict[str, Any] = {}

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, trace)

    def fill(self, fragment: Fragment) -> None:
        """Overwrite a fragment's values, however the tensor was cut when saved. Raises CheckpointError."""
        entry = self._tensors.get(fragment.name)
        if entry is None or entry["shape"] != list(fragment.logical.shape):
            there = "no such tensor" if entry is None else f"shape {entry['shape']}"
            raise CheckpointError(
                f"{self._folder / MANIFEST}: {fragment.name} of shape {list(fragment.logical.shape)} is "
                f"wanted, there is {there}: it was written by another model"
            )
        for kind, value in fragment.values.items():
            if kind not in entry["digest"]:
                raise CheckpointError(f"{self._folder / MANIFEST}: {fragment.name} has no {kind}")
            start, stop = fragment.start, fragment.start + fragment.count
            if entry["fragments"][0]["tp_size"] == fragment.tp_size:
                value.copy_(self._part(fragment.name, kind, fragment.tp_rank, start, stop))
            else:  # another tensor-parallel size: the whole tensor is read, one at a time
                whole = self.whole(fragment.name, kind)
                part = fragment.logical.cut(whole, fragment.tp_rank, fragment.tp_size)
                value.copy_(part.reshape(-1)[start:stop])

    def whole(self, name: str, kind: str = PARAMETER) -> Float[Tensor, "..."]:
        """The whole logical tensor in fp32 on the host. Raises CheckpointError."""
        entry = self._tensors[name]
        logical = LogicalTensor(tuple(entry["shape"]), entry["dim"], tuple(entry["blocks"]))
        size = entry["fragments"][0]["tp_size"]
        shape = logical.cut_shape(size)
        count = torch.Size(shape).numel()
        return logical.join([self._part(name, kind, rank, 0, count).view(shape) for rank in range(size)])

    def _part(self, name: str, kind: str, tp_rank: int, start: int, stop: int) -> Float[Tensor, " n"]:
        """Elements start..stop, flattened, of a tensor-parallel rank's part."""
        values, num_read = torch.empty(stop - start, dtype=torch.float32), 0
        for piece in self._tensors[name]["fragments"]:
            first, last = max(start, piece["start"]), min(stop, piece["start"] + piece["count"])
            if piece["tp_rank"] == tp_rank and first < last:
                values[first - start : last - start] = self._range(
                    piece["file"], _key(name, kind), first - piece["start"], last - piece["start"]
                )
                num_read += last - first
        if num_read != stop - start:
            raise CheckpointError(
                f"{self._folder}: the files hold {num_read} of {stop - start} elements of {_key(name, kind)}"
            )
        return values

    def _range(self, file: str, key: str, first: int, last: int) -> Tensor:
        """Elements first..last of a tensor of a file. Raises CheckpointError."""
        try:
            if file not in self._files:
                self._files[file] = safe_open(self._folder / file, framework="pt").__enter__()
            return self._files[file].get_slice(key)[first:last]
        except (SafetensorError, FileNotFoundError) as error:
            raise CheckpointError(f"{self._folder / file}: {key} cannot be read: {error}") from error


def _key(name: str, kind: str) -> str:
    """Name, in a file, of a logical tensor's values of one kind."""
    return f"{name}/{kind}"
