"""Fragments through files: whatever was written together is read in whatever other pieces."""

import itertools
from pathlib import Path

import pytest
import torch

from parallel.fragments import Fragment
from parallel.logical import LogicalTensor
from pretrain.checkpoint.folder import CheckpointError
from pretrain.checkpoint.shards import HostCopy, ShardReader, merge, write_shard

LOGICALS = {
    "norm": LogicalTensor((12,)),
    "qkv": LogicalTensor((16, 3), 0, (8, 4, 4)),
    "out": LogicalTensor((3, 8), 1),
    "head": LogicalTensor((8, 5), 0),
}


def _whole(name: str, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(map(ord, name + kind)))
    return torch.randn(LOGICALS[name].shape, generator=generator)


def _fragments(
    tp_size: int, dp_size: int, tp_rank: int, dp_rank: int, *, empty: bool = False
) -> list[Fragment]:
    """What one rank holds where each part is cut evenly, and not at its rows, over data-parallel ranks."""
    found = []
    for name, logical in LOGICALS.items():
        cut = logical.dim is not None
        size, rank = (tp_size, tp_rank) if cut else (1, 0)
        values = {}
        start = 0
        for kind in ("parameter", "exp_avg"):
            part = logical.cut(_whole(name, kind), rank, size).reshape(-1)
            per_rank = -(-len(part) // dp_size)
            start = dp_rank * per_rank
            values[kind] = part[start : start + per_rank].clone()
        if empty:
            values = {kind: torch.full_like(value, torch.nan) for kind, value in values.items()}
        found.append(Fragment(name, logical, rank, size, start, values, replica=0 if cut else tp_rank))
    return found


def _save(folder: Path, tp_size: int, dp_size: int) -> dict:
    (folder / "engine").mkdir(parents=True)
    host, shares = HostCopy(), []
    for rank, (dp_rank, tp_rank) in enumerate(itertools.product(range(dp_size), range(tp_size))):
        own = host.take(_fragments(tp_size, dp_size, tp_rank, dp_rank))
        shares.append(write_shard(folder, rank, own))
    return merge(shares)


LAYOUTS = [(1, 1), (2, 1), (1, 3), (2, 2), (4, 1)]


@pytest.mark.parametrize("saved", LAYOUTS)
def test_what_was_saved_in_some_layout_is_read_in_every_other(tmp_path: Path, saved: tuple[int, int]) -> None:
    tensors = _save(tmp_path, *saved)
    assert list(tensors) == sorted(LOGICALS)
    with ShardReader(tmp_path, tensors) as reader:
        for tp_size, dp_size in LAYOUTS:
            for dp_rank, tp_rank in itertools.product(range(dp_size), range(tp_size)):
                expected = _fragments(tp_size, dp_size, tp_rank, dp_rank)
                got = _fragments(tp_size, dp_size, tp_rank, dp_rank, empty=True)
                for a, b in zip(got, expected, strict=True):
                    reader.fill(a)
                    assert all(torch.equal(a.values[kind], b.values[kind]) for kind in b.values)
        for name, logical in LOGICALS.items():
            assert reader.whole(name).shape == logical.shape
            assert torch.equal(reader.whole(name, "exp_avg"), _whole(name, "exp_avg"))


def test_the_manifest_does_not_depend_on_the_layout_but_for_places(tmp_path: Path) -> None:
    entries = [_save(tmp_path / str(n), *layout) for n, layout in enumerate(LAYOUTS)]
    for entry in entries:
        for tensor in entry.values():
            del tensor["fragments"]
    assert all(entry == entries[0] for entry in entries)


def test_a_rank_that_is_missing_is_noticed_when_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    share = write_shard(tmp_path, 0, HostCopy().take(_fragments(1, 3, 0, 0)))
    with pytest.raises(AssertionError, match=r"ranks hold .* elements of norm"):
        merge([share])


def test_the_host_buffer_is_used_again_and_only_copies_0_are_taken(tmp_path: Path) -> None:
    host = HostCopy()
    first = host.take(_fragments(2, 1, 0, 0))
    again = host.take(_fragments(2, 1, 1, 0))
    assert [f.name for f in first] == list(LOGICALS) and [f.name for f in again] == ["qkv", "out", "head"]
    assert first[0].values["parameter"].data_ptr() == again[0].values["parameter"].data_ptr()
    bf16 = Fragment("a", LogicalTensor((3,)), 0, 1, 0, {"parameter": torch.tensor([1, 2, 3]).bfloat16()})
    (copy,) = host.take([bf16])
    assert copy.values["parameter"].dtype == torch.float32
    assert copy.values["parameter"].tolist() == [1, 2, 3]


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    tensors = _save(tmp_path, 2, 1)
    (tmp_path / "engine" / "rank_00001.safetensors").unlink()
    with ShardReader(tmp_path, tensors) as reader, pytest.raises(CheckpointError, match=r"rank_00001\.safet"):
        reader.whole("qkv")
