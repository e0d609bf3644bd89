import signal
import subprocess
import sys

import pytest

from pretrain.train.stop_signal import STOP_SIGNALS

PROGRAM = """
import os, signal, sys
from pretrain.train.stop_signal import StopSignal
stop = StopSignal.install()
assert not stop.requested
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
print(stop.requested, *stop.received)
"""


def _run(*names: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM, *names], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_is_a_wish_and_no_end(name: str):
    result = _run(name)
    assert (result.returncode, result.stdout) == (0, f"True {name}\n")
    assert result.stderr == f"motley: {name}: saving after this step\n"
    assert getattr(signal, name) in STOP_SIGNALS


def test_later_signals_are_remembered_and_change_nothing():
    result = _run("SIGUSR2", "SIGTERM", "SIGINT", "SIGTERM")
    assert (result.returncode, result.stdout) == (0, "True SIGUSR2 SIGTERM SIGINT SIGTERM\n")
    assert result.stderr.count("saving") == 1


def test_nothing_replaces_a_code_that_is_decided():
    program = """
import os, signal, sys
from pretrain.train.stop_signal import StopSignal, ignore_from_here_on
stop = StopSignal.install()
ignore_from_here_on()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
print(stop.received, {signal.getsignal(getattr(signal, name)) for name in sys.argv[1:]} == {signal.SIG_IGN})
raise SystemExit(85)
"""
    command = [sys.executable, "-c", program, "SIGTERM", "SIGUSR2", "SIGINT"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (85, "[] True\n", "")
