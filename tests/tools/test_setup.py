"""tools/setup.sh where something is missing: one clear message, and nothing looks finished."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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


def test_no_network(checkout: Path) -> None:
    # Port 9 (discard) refuses at once; pip's own settings of the machine are left out.
    result = setup(
        checkout,
        PIP_CONFIG_FILE=os.devnull,
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_FIND_LINKS="",
        PIP_RETRIES="1",
    )
    assert result.returncode == 1
    assert "pip reached no package index" in result.stderr
    assert not (checkout / ".venv/motley-setup.stamp").exists()


def test_full_disk(checkout: Path) -> None:
    commands = checkout / "bin"
    commands.mkdir()
    df = commands / "df"
    df.write_text(
        "#!/bin/sh\necho Filesystem 1024-blocks Used Available Capacity Mounted\necho disk 9 8 2048 9% /\n"
    )
    df.chmod(0o755)
    result = setup(checkout, PATH=f"{commands}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert "needs 3 GiB of free disk" in result.stderr and "found 2 MiB" in result.stderr
    assert not (checkout / ".venv").exists()
