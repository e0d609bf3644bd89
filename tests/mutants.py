"""Whether tests see faults: one known fault at a time is put into a copy of the sources, and tests must fail.

    python -m tests.mutants [WORD ...]       with words: only mutants whose file or fault holds one of them

The faults are those of mutants.toml. They are small and would hurt: a sign, a factor, a rank, a sum that is
left out. A fault is tried with the tests that mirror its file and with those that the table names, which must
be green without it. Mutants that no test sees are named at the end, and the exit code is then 1.
"""

import argparse
import importlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 600.0
"""Of the tests of one mutant. Ranks that hang fail their test much sooner (parallel/testing.py)."""
_LIBRARIES = ("torch", "deepspeed", "megatron.core.tensor_parallel", "pytest", "hypothesis", "beartype")
"""They take seconds to import: imported once, and not for every mutant."""


@dataclass(frozen=True)
class Mutant:
    """`old`, which is in the file once, becomes `new`; `tests` are paths or node ids, the cheapest first."""

    file: str
    old: str
    new: str
    fault: str
    tests: tuple[str, ...]


def mutants(root: Path) -> Iterator[Mutant]:
    """All mutants of mutants.toml. Raises ValueError where an old text is not in its file exactly once."""
    for file, entry in tomllib.loads((Path(__file__).with_suffix(".toml")).read_text()).items():
        text = (root / file).read_text()
        mirrored = f"tests/{file.rpartition('/')[0]}/test_{file.rpartition('/')[2]}"
        tests = [mirrored] if (root / mirrored).exists() else []
        for fault, (old, new, *further) in entry["mutants"].items():
            if text.count(old) != 1:
                raise ValueError(f"{file}: {fault!r}: {old!r} is there {text.count(old)} times, and not once")
            yield Mutant(file, old, new, fault, (*tests, *further, *entry.get("tests", ())))


def outcome(mutant: Mutant, copy: Path) -> str:
    """ "killed", "survived", or what went wrong, after a mutant's tests have run in `copy`, a repository."""
    place = copy / mutant.file
    good = place.read_text()
    place.write_text(good.replace(mutant.old, mutant.new))
    try:
        code = exit_code(copy, mutant.tests)
    finally:
        place.write_text(good)
    # 1: a test failed; all else, such as a file that cannot be imported, is a mistake in mutants.toml.
    return {0: "survived", 1: "killed", -signal.SIGKILL: "too slow"}.get(code, f"pytest ended with {code}")


def exit_code(folder: Path, tests: Sequence[str]) -> int:
    """Of pytest on `tests` of the repository in `folder`; -SIGKILL where they took longer than TIMEOUT_S."""
    sys.stdout.flush()
    if not (pid := os.fork()):
        os.setsid()
        os.chdir(folder)
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        sys.path[:] = [str(folder), *(place for place in sys.path if place not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]
        importlib.invalidate_caches()
        pytest = importlib.import_module("pytest")
        os._exit(pytest.main(["-xq", "-p", "no:cacheprovider", "-p", "no:xdist", *tests]))
    deadline = time.monotonic() + TIMEOUT_S
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return os.waitstatus_to_exitcode(ended[1])


def copy_of(root: Path, folder: Path) -> Path:
    """`folder` with the files of the working tree that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, folder / name)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants")
    parser.add_argument("words", nargs="*", metavar="WORD")
    words = parser.parse_args(argv).words
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    sys.dont_write_bytecode = True  # of a file that changes within a second
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for library in _LIBRARIES:
        importlib.import_module(library)
    unseen, count = [], 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_of(ROOT, Path(folder))
        for mutant in mutants(ROOT):
            if words and not any(word in f"{mutant.file} {mutant.fault}" for word in words):
                continue
            began, count = time.monotonic(), count + 1
            result = outcome(mutant, copy)
            seconds = time.monotonic() - began
            print(f"{seconds:5.0f} s  {result}  {mutant.file}: {mutant.fault}", flush=True)
            if result != "killed":
                unseen.append(mutant)
    print(f"{count} mutants, {count - len(unseen)} killed; not killed:")
    for file, group in itertools.groupby(unseen, key=lambda mutant: mutant.file):
        print(f"  {file}: {'; '.join(mutant.fault for mutant in group)}")
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
