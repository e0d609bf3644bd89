import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.pretrain.tiny_data import tiny_run
from tests.toml_text import toml_text
from tools.cli import main, parser

VERBS = (
    "demo-corpus",
    "look",
    "tokenize",
    "import-data",
    "train",
    "submit",
    "status",
    "cancel",
    "logs",
    "compare",
    "audit",
    "export",
    "import",
    "generate",
    "evaluate",
    "inspect",
    "describe",
    "plan",
    "bench",
)


SLOW = {"torch", "numpy", "scipy", "deepspeed", "megatron", "webdataset", "matplotlib", "PIL", "tensorboard"}
BENCHMARKS = ("model", "sparse", "data")


def printed_without_torch(*arguments: str) -> str:
    """What `motley ARGUMENTS` prints in a process of its own, which must end well and import nothing that
    takes long."""
    code = (
        "import sys\nfrom tools.cli import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"raise SystemExit(' '.join({SLOW!r} & sys.modules.keys()) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


HELPS = ["--help", *(f"{verb} --help" for verb in VERBS), *(f"bench {what} --help" for what in BENCHMARKS)]


@pytest.mark.parametrize("arguments", map(str.split, HELPS), ids=HELPS)
def test_help_imports_no_torch(arguments: list[str]) -> None:
    assert "usage: motley" in printed_without_torch(*arguments)


def test_version_is_that_of_pyproject() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert printed_without_torch("--version") == f"motley {project['version']}\n"


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


def test_status_takes_several_files_and_overrides(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(toml_text(tiny_run(tmp_path, tmp_path / "runs")))
    assert main(["status", "name=other", str(path)]) == 0
    assert f"{tmp_path}/runs/other: never submitted" in capsys.readouterr().out
    assert main(["status", str(path), str(path)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["run", "tiny", "tiny"]
    for verb in ("status", "cancel", "logs"):
        assert main([verb, str(tmp_path)]) == 2
        assert f"motley {verb}: {tmp_path}: holds neither a run" in capsys.readouterr().err


def test_nobody_has_to_read_to_the_end(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(toml_text(tiny_run(tmp_path, tmp_path / "runs")))
    command = [sys.executable, "-m", "tools.cli", "status", *[str(path)] * 2]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == b"" and process.returncode == 0


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
