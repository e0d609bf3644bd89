import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.cli import main, parser

VERBS = (
    "demo-corpus",
    "tokenize",
    "train",
    "submit",
    "compare",
    "export",
    "import",
    "inspect",
    "describe",
    "plan",
    "bench",
)


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom tools.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "raise SystemExit(int('torch' in sys.modules or 'numpy' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "usage: motley" in result.stdout


def test_verbs_listed_here_are_all_there_are() -> None:
    listed = re.findall(
        r"^    (\S+)", parser().format_help().split("positional arguments:")[1], flags=re.MULTILINE
    )
    assert tuple(listed) == VERBS


def test_users_mistake_is_one_message_and_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text("nam = 'x'\n")
    assert main(["describe", str(path)]) == 2
    error = capsys.readouterr().err
    assert f'{path}: nam: unknown key; did you mean "name"?' in error
    assert "Traceback" not in error


def test_unknown_verb_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2
    assert "train" in capsys.readouterr().err


def test_overrides_may_follow_options(capsys: pytest.CaptureFixture[str]) -> None:
    """argparse alone takes them in one place only."""
    assert main(["train", "nowhere.toml", "name=a", "--processes", "2", "parallel.tp=2"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err
    for stray in ("--ranks", "tp"):
        with pytest.raises(SystemExit):
            main(["train", "nowhere.toml", "--processes", "2", stray])
        assert f"unrecognized arguments: {stray}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["tokenize", "a", "b", "--config", "c.toml", "name=a"])
