"""How a rank ended. What torch, gloo and the kernel say is what they say here, not what is remembered."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from errno import EDQUOT, ENOENT, ENOMEM, ENOSPC, EROFS
from pathlib import Path

import pytest
import torch

from parallel.launch import die_with_parent, rank_facts
from parallel.layout import ParallelConfig
from parallel.rank_end import EndRecord, behind, kind_of_error, kind_of_text, one_line
from parallel.testing import run_on_ranks
from parallel.world import World, start

REPOSITORY = Path(__file__).parents[2]


def test_the_record_appears_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "node2")
    end = EndRecord(str(tmp_path), 3)
    path = tmp_path / "rank3.end.json"
    assert not path.exists()
    end.close(exit_code=1, kind="error", message="first:\n  second \N{SNOWMAN}\nthird", step=7)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    record = json.loads(path.read_text())
    assert record.pop("time") > 0
    assert record == {
        **{"rank": 3, "host": "node2", "exit_code": 1, "kind": "error"},
        **{"message": "first: second \N{SNOWMAN}", "step": 7},
    }


def test_without_a_place_nothing_is_written_and_nothing_raised(tmp_path: Path) -> None:
    EndRecord(None, 3).close(exit_code=0, kind="done", message="", step=1)
    EndRecord(str(tmp_path / "gone"), 3).close(exit_code=0, kind="done", message="", step=1)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import sys
from pathlib import Path
from parallel.rank_end import EndRecord
folder = Path(sys.argv[1])
ends = [EndRecord(str(folder), 0)]
try:
    with (folder / "checkpoint").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
except OSError:
    ends.append(EndRecord(str(folder), 1))
for end in ends:
    end.close(exit_code=1, kind="disk", message="m" * 300, step=None)
print(*sorted(path.name for path in folder.iterdir()))
"""


def test_on_a_disk_that_is_full_there_is_room_for_the_record(tmp_path: Path) -> None:
    own = 'mount -t tmpfs -o size=64k none "$0" && exec "$@"'
    words = ["unshare", "-rm", "sh", "-c", own, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*words, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system of 64 KiB")
    done = subprocess.run(
        [*words, sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    # rank 1 came when the disk was full already
    assert "rank0.end.json" in done.stdout and "rank1.end.json\n" not in done.stdout, (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out_of_memory"),
        (OSError(ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (OSError(ENOSPC, "No space left on device"), "disk"),
        (OSError(EDQUOT, "Disk quota exceeded"), "disk"),
        (OSError(EROFS, "Read-only file system"), "disk"),
        (ValueError("checkpoint x cannot be written (rank 1): [Errno 28] No space left on device"), "disk"),
        (OSError(ENOENT, "No such file"), None),
        (ConnectionResetError("Connection reset by peer"), None),  # of a URL of the data's
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), "lost_peer"),
        (torch.distributed.DistBackendError("NCCL error: Cuda failure 'out of memory'"), "out_of_memory"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("x"), None),
    ],
)
def test_what_an_error_says(error: Exception, kind: str | None) -> None:
    assert kind_of_error(error) == kind


def test_what_torch_says_when_memory_is_out() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 58)
    assert kind_of_error(raised.value) == "out_of_memory", raised.value


def test_what_happened_first_comes_first() -> None:
    def fail() -> None:
        try:
            try:
                raise OSError("of the disk")
            except OSError as error:
                raise ValueError("of the checkpoint") from error
        finally:
            raise RuntimeError("of a peer")

    with pytest.raises(RuntimeError) as raised:
        fail()
    assert [(str(error), str(told_as)) for error, told_as in behind(raised.value)] == [
        ("of the disk", "of the checkpoint"),
        ("of the checkpoint", "of the checkpoint"),
        ("of a peer", "of a peer"),
    ]
    raised.value.__suppress_context__ = True
    assert len(behind(raised.value)) == 1


def test_one_line() -> None:
    assert one_line(" a  b \nc") == "a b" and one_line("a:\n\n  b\nc") == "a: b" and one_line("") == ""
    assert len(one_line("x" * 999)) == 300


Part = Callable[[World], None]


def _dies(world: World) -> None:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.all_reduce(torch.zeros(1 << 16))


def _dies_on_the_way(world: World) -> None:
    for round_ in range(10_000):
        if world.rank == 1 and round_ == 50:
            os.kill(os.getpid(), signal.SIGKILL)
        world.gather({"rank": world.rank})


def _is_stuck(world: World) -> None:
    if world.rank == 1:
        signal.pause()
    world.any(True)


def _never_comes(world: World) -> None:
    raise AssertionError("ranks have met")


def _survivor(part: Part) -> str | None:
    """What rank 0 has to say. The rank that it loses is a child of rank 1, which itself must not die: rank 0
    would be given no time to notice."""
    if rank_facts().rank == 1:
        parent = os.getpid()
        if os.fork():
            return None
        die_with_parent(parent)
        os.closerange(3, 256)  # among them the pipe whose end is awaited
        if part is _never_comes:
            os._exit(1)
    try:
        part(start(ParallelConfig(collective_timeout_s=5)))
    except RuntimeError as error:
        return f"{kind_of_error(error)} {kind_of_text(str(error))} {type(error).__name__}: {error}"
    raise AssertionError("nobody was lost")


@pytest.mark.parametrize("part", [_dies, _dies_on_the_way, _is_stuck, _never_comes])
def test_what_a_rank_says_that_has_lost_its_peer(part: Part) -> None:
    said = run_on_ranks(_survivor, 2, part)[0]
    assert said.startswith("lost_peer lost_peer "), said
