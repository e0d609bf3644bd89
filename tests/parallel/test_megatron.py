import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_import_is_silent_and_brings_no_compiler() -> None:
    check = (
        "import sys, torch; compiler = torch.compile; import parallel.megatron; "
        "raise SystemExit('torch._inductor.compile_fx' in sys.modules or torch.compile is not compiler)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", check], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
