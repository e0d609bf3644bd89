import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Sample, ShardError, write_shard
from data_pipeline.tokenize.isolated import LOST_IN_A_ROW, Refused, use_samples
from data_pipeline.tokenize.limits import Limits
from tests.data_pipeline.deadly_tokenizer import obey

LIMITS = Limits(sample_timeout_s=1, sample_memory_gib=0.5)


def shard_of(path: Path, *contents: bytes) -> Path:
    write_shard(path, [(f"{number:03}", {"bin": content}) for number, content in enumerate(contents)])
    return path


def use(_: str, sample: Sample) -> bytes:
    content = sample["bin"]
    return b"too large" if content is None else obey(content)


def results(*shards: Path, function: Callable[[str, Sample], Any] = use, **options: Any) -> list[Any]:
    return [made for _, _, made in use_samples(shards, function, LIMITS, **options)]


def test_samples_come_in_order_from_all_shards(tmp_path: Path) -> None:
    first = shard_of(tmp_path / "a.tar", *(b"a%d" % number for number in range(70)))
    second = shard_of(tmp_path / "b.tar", b"b0", b"b1")
    found = list(use_samples([first, second], use, LIMITS))
    assert [shard for shard, _, _ in found] == [first] * 70 + [second] * 2
    assert [key for _, key, _ in found] == [f"{number:03}" for number in [*range(70), 0, 1]]
    assert results(first, second)[-3:] == [b"a69", b"b0", b"b1"]
    assert results(first, second, per_shard=1) == [b"a0", b"b0"]


def test_each_kind_of_end_costs_its_sample_alone(tmp_path: Path) -> None:
    faults = {
        b"crash": "its decoder crashed (SIGSEGV)",
        b"exit": "its decoder exited with 3",
        b"hang": "its decoder took longer than limits.sample_timeout_s = 1",
        b"memory": "MemoryError in ",
        b"stack": "RecursionError in ",
        b"error": r"KeyError in deadly_tokenizer.py:",
    }
    contents = [part for fault in faults for part in (b"good", fault)]
    made = results(shard_of(tmp_path / "a.tar", *contents, b"good"))
    assert made[::2] == [b"good"] * 7
    for refused, reason in zip(made[1::2], faults.values(), strict=True):
        assert isinstance(refused, Refused) and refused.reason.startswith(reason)
        assert refused.reason.isprintable()


def test_many_lost_in_a_row_are_no_fault_of_the_samples(tmp_path: Path) -> None:
    few = shard_of(tmp_path / "a.tar", *[b"exit"] * (LOST_IN_A_ROW - 1), b"good")
    assert results(few)[-1] == b"good"
    with pytest.raises(
        ConfigError, match=r"b\.tar: its decoder exited with 3, as for the 7 samples before it"
    ):
        results(shard_of(tmp_path / "b.tar", *[b"exit"] * 50))


def test_a_shard_that_breaks_is_said_after_what_was_read(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", b"first", b"second")
    path.write_bytes(path.read_bytes()[:1800])
    samples = use_samples([path], use, LIMITS)
    assert next(samples)[2] == b"first"
    with pytest.raises(ShardError, match=r'a\.tar: truncated or damaged near sample "001"'):
        list(samples)


def test_samples_above_the_limit_are_not_read(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", b"small", bytes(3 << 20), b"small")
    found = [made for _, _, made in use_samples([path], use, Limits(sample_mib=1))]
    assert found == [b"small", b"too large", b"small"]


def process_id(_: str, __: Sample) -> int:
    return os.getpid()


def test_no_child_is_left_when_the_rest_is_not_wanted(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a.tar", *[b"good"] * 100)
    samples = use_samples([path], process_id, LIMITS)
    child = next(samples)[2]
    assert child != os.getpid()
    samples.close()
    assert not psutil.pid_exists(child) or psutil.Process(child).ppid() != os.getpid()


def hang_after_the_first(key: str, sample: Sample) -> int:
    use(key, sample)
    return os.getpid()


def pass_on(shard: Path, sender: Connection) -> None:
    for _, _, made in use_samples([shard], hang_after_the_first, LIMITS):
        sender.send(made)


def test_a_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.tar", *[b"x"] * 40, b"hang")
    receiver, sender = multiprocessing.Pipe(duplex=False)
    parent = multiprocessing.get_context("fork").Process(target=pass_on, args=(shard, sender))
    parent.start()
    child = psutil.Process(receiver.recv())
    parent.kill()
    parent.join()
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive
