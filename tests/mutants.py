"""Whether tests see faults: one known fault at a time is put into a copy of the sources, and tests must fail.

    python -m tests.mutants [--jobs 2] [WORD ...]       only mutants whose file or fault holds a WORD

The faults are those of mutants.toml. They are small and would hurt: a sign, a factor, a rank, a sum that is
left out. A fault is tried with the tests that mirror its file and with those that the table names; without the
fault these tests must be green. Mutants that no test sees are named at the end, and the exit code is then 1.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240.0
"""Of the tests of one mutant. A mutant that makes them hang is seen."""


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
            yield Mutant(file, old, new, fault, (*tests, *entry.get("tests", ()), *further))


def outcome(mutant: Mutant, copy: Path) -> str:
    """ "killed", "survived", or what went wrong, after a mutant's tests have run in `copy`, a repository."""
    place = copy / mutant.file
    good = place.read_text()
    place.write_text(good.replace(mutant.old, mutant.new))
    try:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-xq",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *mutant.tests,
        ]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        place.write_text(good)
    # 1: a test failed; all else, such as a file that cannot be imported, is a mistake in mutants.toml.
    verdicts = {0: "survived", 1: "killed"}
    return verdicts.get(done.returncode) or f"pytest ended with {done.returncode}: {done.stdout[-1500:]}"


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
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    chosen = [
        mutant
        for mutant in mutants(ROOT)
        if not args.words or any(word in f"{mutant.file} {mutant.fault}" for word in args.words)
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            copies.put(copy_of(ROOT, Path(folder, str(number))))

        def tried(mutant: Mutant) -> tuple[Mutant, str, float]:
            copy, began = copies.get(), time.monotonic()
            result = outcome(mutant, copy)
            copies.put(copy)
            return mutant, result, time.monotonic() - began

        results = []
        for mutant, result, seconds in pool.map(tried, chosen):
            print(f"{seconds:5.0f} s  {result}  {mutant.file}: {mutant.fault}", flush=True)
            results.append((mutant, result))
    unseen = [mutant for mutant, result in results if result != "killed"]
    print(f"{len(results)} mutants, {len(results) - len(unseen)} killed; not killed:")
    for file, group in itertools.groupby(unseen, key=lambda mutant: mutant.file):
        print(f"  {file}: {'; '.join(mutant.fault for mutant in group)}")
    return 1 if unseen else 0


if __name__ == "__main__":
    raise SystemExit(main())
