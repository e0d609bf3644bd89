import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from pretrain.train import stop_signal
from pretrain.train.stop_signal import GRACE_S, STOP_SIGNALS, StopSignal, gets_nowhere

PROGRAM = """
import os, signal, sys, time
from pretrain.train.stop_signal import StopSignal
stop = StopSignal.install(lambda why: None, lambda: False)
assert not stop.requested
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
deadline = time.monotonic() + 60
while len(stop.received) < len(sys.argv[1:]) and time.monotonic() < deadline:
    time.sleep(0.001)
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
stop = StopSignal.install(lambda why: None, lambda: False)
ignore_from_here_on()
for name in sys.argv[1:]:
    os.kill(os.getpid(), getattr(signal, name))
print(stop.received, {signal.getsignal(getattr(signal, name)) for name in sys.argv[1:]} == {signal.SIG_IGN})
raise SystemExit(85)
"""
    command = [sys.executable, "-c", program, "SIGTERM", "SIGUSR2", "SIGINT"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (85, "[] True\n", "")


@pytest.mark.parametrize(
    ("waited_s", "stage_s", "longest_s", "peer_ended", "leaves"),
    [
        (GRACE_S - 0.1, 600.0, 1.0, True, False),  # a step may yet end
        (GRACE_S, 600.0, 1.0, False, True),  # it hung long before the signal
        (GRACE_S, GRACE_S, 1.0, False, True),
        (GRACE_S, 15.0, 10.0, False, False),  # steps of 10 s: a healthy one may take 20
        (30.0, 41.0, 20.0, False, True),
        (GRACE_S, 15.0, 10.0, True, True),  # nobody to end the step with
        (1e6, 1e6, float("inf"), False, False),  # a save
        (GRACE_S, GRACE_S, 0.0, False, True),  # nothing to lose
    ],
)
def test_when_a_rank_gets_nowhere(
    waited_s: float, stage_s: float, longest_s: float, peer_ended: bool, leaves: bool
):
    at = 1000.0
    found = gets_nowhere(
        at, asked=at - waited_s, began=at - stage_s, longest_s=longest_s, peer_ended=lambda: peer_ended
    )
    assert found == leaves


def test_a_stage_may_take_twice_as_long_as_the_longest_of_its_kind(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(stop_signal.time, "monotonic", lambda: clock[0])
    ended: list[bool] = []
    stop = StopSignal(lambda why: None, lambda: bool(ended))

    def enter(stage: stop_signal.Stage, at: float) -> Callable[[float], bool]:
        """Whether the rank leaves at a time, if it was asked to stop as the stage began."""
        clock[0] = at
        stop.enter(stage)
        return lambda now: stop._gets_nowhere(now, at)

    leaves = enter("start", 100.0)
    assert not leaves(103.9) and leaves(104.0)
    leaves = enter("step", 200.0)
    assert not leaves(203.9) and leaves(204.0)  # the first step: no step is lost
    leaves = enter("evaluation", 220.0)
    assert not leaves(1e9)  # nobody knows how long the first one takes
    leaves = enter("step", 250.0)
    assert not leaves(289.9) and leaves(290.0)  # twice the 20 s of the first step
    leaves = enter("step", 251.0)  # a shorter step changes nothing
    assert not leaves(290.9) and leaves(291.0)
    leaves = enter("evaluation", 300.0)
    assert not leaves(359.9) and leaves(360.0)  # twice the 30 s of the first one
    leaves = enter("save", 400.0)
    assert not leaves(1e9)
    ended.append(True)
    assert not leaves(403.9) and leaves(404.0)  # no save is whole without the rank that has ended
    with pytest.raises(KeyError), stop:
        raise KeyError
    assert not stop._gets_nowhere(1e9, 400.0)  # it leaves by itself, with a cause
