"""tools/setup.sh where something is missing: one clear message, and nothing looks finished."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


NO_INDEX = {
    # Port 9 (discard) refuses at once; pip's own settings of the machine are left out.
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_RETRIES": "1",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "tools/setup.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("bash") or "bash", "tools/setup.sh"],
        cwd=checkout,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_no_python(checkout: Path) -> None:
    commands = checkout / "bin"
    commands.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "df", "awk"):
        (commands / name).symlink_to(shutil.which(name) or name)
    result = setup(checkout, PATH=str(commands))
    assert result.returncode == 1
    assert result.stderr.startswith("setup: needs Python >= 3.11, found none. Install one")


def test_the_named_python_is_never_swapped_for_another(checkout: Path) -> None:
    result = setup(checkout, PYTHON="/nonexistent/python")
    assert result.returncode == 1
    assert "PYTHON=/nonexistent/python is no Python >= 3.11" in result.stderr


def commands_with_free_disk(checkout: Path, kib: int) -> str:
    """A PATH in which df finds so much, and no GPU is seen."""
    (checkout / "bin").mkdir()
    set_free_disk(checkout, kib)
    write_command(checkout, "nvidia-smi", "exit 9")
    return f"{checkout / 'bin'}:{os.environ['PATH']}"


def set_free_disk(checkout: Path, kib: int) -> None:
    header = "Filesystem 1024-blocks Used Available Capacity Mounted"
    write_command(checkout, "df", f"echo {header}\necho disk 9 8 {kib} 9% /")


def write_command(checkout: Path, name: str, script: str) -> None:
    (checkout / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
    (checkout / "bin" / name).chmod(0o755)


def test_no_network_no_gpu_and_then_little_disk(checkout: Path) -> None:
    """It says what it would bring and how to bring less, and that no index was reached."""
    path = commands_with_free_disk(checkout, 9 << 20)
    result = setup(checkout, **NO_INDEX, PATH=path)
    assert result.returncode == 1
    assert "torch for CUDA, 5.6 GB on disk" in result.stdout
    assert "no GPU is seen here. The CPU build of torch takes 1.9 GB" in result.stdout
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/setup.sh" in result.stdout
    assert "pip reached no package index" in result.stderr

    set_free_disk(checkout, 5 << 20)
    result = setup(checkout, **NO_INDEX, PATH=path)
    assert result.returncode == 1
    assert "needs 8 GiB of free disk" in result.stderr and "asks for 3 GiB: PIP_EXTRA" in result.stderr
    assert not (checkout / ".venv/motley-setup.stamp").exists()


def test_full_disk(checkout: Path) -> None:
    result = setup(checkout, PATH=commands_with_free_disk(checkout, 2048))
    assert result.returncode == 1
    assert "needs 3 GiB of free disk" in result.stderr and "found 2 MiB" in result.stderr
    assert not (checkout / ".venv").exists()
