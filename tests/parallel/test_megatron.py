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
    # torch's build for CUDA says this on a machine without a GPU.
    said = [line for line in done.stderr.decode().splitlines() if "No CUDA runtime is found" not in line]
    assert done.returncode == 0 and not said, said
