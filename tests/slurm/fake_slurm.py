"""Slurm's commands as programs that note what they were told, for tests that need no cluster."""

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

_COMMANDS = {
    "sbatch": """
[ "$(wc -l <"$here"/jobs)" -lt "$(cat "$here"/accepts)" ] || { echo "sbatch: error: no more" >&2; exit 1; }
cp "${@: -1}" "$here"/script_$((17 + $(wc -l <"$here"/jobs)))
printf '%s\\x1f' "$@" >>"$here"/jobs; echo >>"$here"/jobs
echo $((16 + $(wc -l <"$here"/jobs)))""",
    "squeue": """
for word; do
  case $word in --jobs=*) jobs=${word#--jobs=} ;; --format=*) format=${word#--format=} ;; esac
done
for job in ${jobs//,/ }; do
  case $format in '%T %j') shown='\\1 \\2' ;; *) shown="$job|\\1|None|N/A|\\2" ;; esac
  sed -nE "s#^$job ([^ ]+) (.*)#$shown#p" "$here"/queue
done""",
    "scancel": 'echo "$@" >>"$here"/cancelled',
}


class FakeSlurm:
    """Jobs get the ids 17, 18 ...; `queue` says what squeue finds."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._monkeypatch = folder, monkeypatch
        folder.mkdir()
        for name, text in _COMMANDS.items():
            (folder / name).write_text(f"#!/bin/bash\nhere={shlex.quote(str(folder))}\n{text}\n")
            (folder / name).chmod(0o755)
        for name in ("jobs", "cancelled"):
            (folder / name).touch()
        self.accept(1000)
        self.queue()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin")

    def accept(self, more: int) -> None:
        """So many further jobs are taken, and then none."""
        (self.folder / "accepts").write_text(str(len(self.jobs) + more))

    def queue(self, **jobs: str) -> None:
        """`_17_2="PENDING name"`: all that is in the queue."""
        lines = (f"{job.removeprefix('_')} {state}\n" for job, state in jobs.items())
        (self.folder / "queue").write_text("".join(lines))

    @property
    def jobs(self) -> list[dict[str, str]]:
        """The options of each job that was taken, in order."""
        found = []
        for line in (self.folder / "jobs").read_text().splitlines():
            words = re.findall(r"--([a-z-]+)=?([^\x1f]*)\x1f", line)
            found.append(dict(words))
        return found

    def script(self, job: int) -> str:
        return (self.folder / f"script_{job}").read_text()

    @property
    def cancelled(self) -> list[str]:
        return (self.folder / "cancelled").read_text().split()

    def remove(self) -> None:
        """A machine without Slurm."""
        shutil.rmtree(self.folder)
        self._monkeypatch.setenv("PATH", str(self.folder))
