import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys
from pathlib import Path
from pretrain.train.rank_log import log_rank
terminal = log_rank(Path(sys.argv[1]), int(sys.argv[2]))
print("plain")
print("error", file=sys.stderr)
sys.stderr.write("\\rbar 1/2")
os.write(1, b"from C\\n")
print(sys.stderr.isatty(), file=sys.stderr)
if terminal is not None:
    print("look into", terminal.log.name, file=terminal.stream)
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_0_keeps_the_terminal_and_every_rank_has_a_log(tmp_path: Path, rank: int):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"rank{rank}.log").write_text("earlier attempt\n")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "logs"), str(rank)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "logs" / f"rank{rank}.log").read_text()
    assert log.startswith("earlier attempt\n") and "plain\n" in log and "error\n" in log
    if rank == 0:
        assert "plain\n" in result.stdout and "error\n" in result.stderr and "bar" in result.stderr
        assert "bar" not in log  # a line that redraws itself
    else:
        assert result.stdout == "" and result.stderr == "look into rank1.log\n"
        assert "from C\n" in log
