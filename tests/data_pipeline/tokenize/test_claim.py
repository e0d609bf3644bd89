import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.claim import claimed

FACTS = {"config": {"seed": 1, "image": {"num_codes": 512}}, "source": {"train": {"a.tar": 10}}}


def claim(out: Path, facts: dict = FACTS) -> None:
    with claimed(out, "settings.json", facts, "token shards"):
        pass


def refusal(out: Path, facts: dict = FACTS) -> str:
    with pytest.raises(ConfigError) as error:
        claim(out, facts)
    return str(error.value)


def test_a_folder_is_begun_and_continued(tmp_path: Path) -> None:
    claim(tmp_path / "deep" / "out")
    (tmp_path / "deep" / "out" / "tokens-00000.tar").touch()
    claim(tmp_path / "deep" / "out")


def test_other_facts_are_refused_and_each_difference_is_named(tmp_path: Path) -> None:
    claim(tmp_path)
    facts = {"config": {"seed": 1, "image": {"num_codes": 1024}}, "source": {"train": {"b.tar": 10}}}
    message = refusal(tmp_path, facts)
    assert "config.image.num_codes: there 512, now 1024" in message
    assert "source.train.a.tar: there 10, now nothing" in message
    assert "source.train.b.tar: there nothing, now 10" in message
    assert "seed" not in message


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no token shards" in refusal(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with claimed(tmp_path, "settings.json", FACTS, "token shards"):
        assert re.search(
            rf"pid {os.getpid()} on .* is writing it; wait for it, or stop it", refusal(tmp_path)
        )
    claim(tmp_path)


def part_of(out: Path, k: int, n: int) -> AbstractContextManager[None]:
    return claimed(out, "settings.json", FACTS, "token shards", part=(k, n))


HOLD = """
import json, sys, time
from pathlib import Path
from data_pipeline.tokenize.claim import claimed
out, facts, k, n = sys.argv[1:]
with claimed(Path(out), "settings.json", json.loads(facts), "token shards", part=(int(k), int(n))):
    print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def part_of_another_process(out: Path, k: int, n: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out), json.dumps(FACTS), str(k), str(n)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield
    finally:
        process.kill()
        process.wait()


def test_parts_write_beside_each_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was not begun"), part_of(tmp_path / "new", 1, 2):
        pass
    assert not (tmp_path / "new").exists()
    claim(tmp_path)
    with part_of_another_process(tmp_path, 1, 2), part_of_another_process(tmp_path, 2, 2):
        with pytest.raises(ConfigError, match=r"pid .* is writing part 1 of 2"), part_of(tmp_path, 1, 2):
            pass
        with pytest.raises(ConfigError, match=r"writing part [12] of 2"), part_of(tmp_path, 3, 3):
            pass  # it cuts the work otherwise, and would meet shards of the other parts
        assert "another process is writing it" in refusal(tmp_path)
    with part_of(tmp_path, 3, 3):
        pass
    with (
        claimed(tmp_path, "settings.json", FACTS, "token shards"),
        pytest.raises(ConfigError, match="is writing it"),
        part_of(tmp_path, 1, 2),
    ):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "settings.json"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(tmp_path / "file" / "out")


def test_a_damaged_record_is_said(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)


def test_a_folder_that_no_terminal_shows_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "a\nb\x1b[2J")
    assert message.isprintable() and "takes no control characters" in message
    assert not list(tmp_path.iterdir())
