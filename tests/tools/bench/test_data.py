import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.bench.data import READERS, main


def test_it_measures_every_reader_and_prints_how_to_repeat_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"documents": 60, "tokens": 8_192, "context-tokens": 1_024, "sequences-per-step": 4, "repeats": 2}
    arguments = [str(word) for name, value in sizes.items() for word in (f"--{name}", value)]
    assert main([*arguments, "--folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for name in READERS:
        row = re.search(rf"^{name}((?: +[0-9.]+){{5}})  ", out, re.MULTILINE)
        assert row, f"no row for {name}"
        median, least, most, relative, cpu_ms = map(float, row[1].split())
        assert 0 < least <= median <= most and relative > 0 and cpu_ms >= 0
    assert "2 steps of 4 x 1024 slots" in out
    assert "motley bench data " + " ".join(arguments) in out
    assert not list(tmp_path.iterdir()), "the shards are gone"


def test_help_needs_no_torch() -> None:
    program = (
        "import sys, tools.bench.data as bench; bench.parser().format_help();"
        "print(sorted({'torch', 'webdataset', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
