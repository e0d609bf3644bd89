import dataclasses
import json
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.stream.fingerprint import chain
from data_pipeline.stream.loader import StepBatch
from data_pipeline.stream.stream import StreamState
from pretrain.metrics import SPENT
from pretrain.train.spikes import Spike
from pretrain.train.state import TrainState

START = StreamState(0, 0, 0, seed=1, context_tokens=64, sources=(("hash", "1"),))
BATCH = StepBatch(
    micro_batches=(),
    inputs=(),
    state_after=dataclasses.replace(START, sequence=4, sequences=4),
    wait_s=0.5,
    fill_frac=0.9,
    epochs=(0.125,),
    digest=0,
    unreadable=(),
)


def test_a_state_advances_and_comes_back_from_json_bit_for_bit():
    state = TrainState.start(START)
    for loss in (0.1, 0.2, 1 / 3):
        state = state.advance(BATCH, {"loss/text": loss, "weight/text": 2.0, "steps": 1.0})
    assert (state.step, state.epochs) == (3, (0.125,))
    assert state.total == state.window == {"loss/text": 0.1 + 0.2 + 1 / 3, "weight/text": 6.0, "steps": 3.0}
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_thresholds_are_those_of_the_next_step_and_come_back_exactly():
    thresholds = {"blocks.3.depth.image": float.fromhex("0x1.99999ap-4"), "blocks.3.depth.text": -1e-7}
    shares = {"blocks.3.depth.image": 1 / 3, "blocks.3.depth.text": 0.25}
    routers = {"blocks.3.depth.image": {"tokens": 10.0, "gate": 1 / 3}}
    state = TrainState.start(START).advance(BATCH, {"steps": 1.0}, routers, thresholds, shares)
    back = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert (back.thresholds, back.shares, back.router_window) == (thresholds, shares, routers)
    twice = back.advance(BATCH, {"steps": 1.0}, routers)
    assert twice.router_window == {"blocks.3.depth.image": {"tokens": 20.0, "gate": 2 / 3}}
    assert twice.logged().router_window == {}
    older = TrainState.start(START).to_json()
    del older["thresholds"], older["shares"]
    assert TrainState.from_json(older).thresholds == {}


def test_the_fingerprint_is_chained_and_unreadable_documents_are_named_once():
    first = dataclasses.replace(BATCH, digest=2**63 + 1, unreadable=("a/1", "a/2"))
    one = TrainState.start(START).advance(first, {"steps": 1.0})
    assert one.fingerprint == 2**63 + 1 and one.unreadable == ("a/1", "a/2") and one.unreadable_in_rows == 0
    after = dataclasses.replace(BATCH.state_after, sequences=8)
    second = dataclasses.replace(BATCH, state_after=after, digest=5, unreadable=("a/0", "a/2"))
    assert one.new_unreadable(second) == ("a/0",)
    two = one.logged().advance(second, {"steps": 1.0})
    assert two.fingerprint == chain(2**63 + 1, 5, 4)
    assert two.unreadable == ("a/1", "a/2", "a/0") and two.unreadable_in_rows == 2
    assert TrainState.from_json(json.loads(json.dumps(two.to_json()))) == two


def test_the_state_of_a_version_whose_stream_had_the_fingerprint_is_read():
    older = TrainState.start(START).to_json()
    stream = json.loads(older["stream"]) | {"format": 1, "fingerprint": 2**63 + 1}
    del older["fingerprint"], older["unreadable"], older["unreadable_in_rows"]
    state = TrainState.from_json(older | {"stream": json.dumps(stream)})
    first_order = dataclasses.replace(START, order=1)
    assert state == dataclasses.replace(TrainState.start(first_order), fingerprint=2**63 + 1)


def test_a_run_that_goes_back_keeps_what_it_has_consumed_and_spent():
    costs = dict.fromkeys(SPENT, 1.0) | {"loss/text": 2.0}
    saved = TrainState.start(START).advance(BATCH, costs, recent=((0.1, 1 / 3),))
    behind = dataclasses.replace(BATCH.state_after, sequence=12, sequences=12)
    batch = dataclasses.replace(BATCH, state_after=behind, epochs=(0.5,), digest=9, unreadable=("a/1",))
    after = saved.skip(batch, costs, "so", {"router": 0.5}, {})
    assert (after.step, after.recent, after.thresholds) == (2, saved.recent, {"router": 0.5})
    assert after.spikes == (Spike(2, "so", None),) and after.total["loss/text"] == 2.0
    assert TrainState.from_json(json.loads(json.dumps(after.to_json()))) == after
    back = after.go_back(saved)
    assert (back.step, back.window, back.recent, back.thresholds) == (1, saved.window, saved.recent, {})
    assert (back.stream, back.fingerprint, back.epochs) == (behind, after.fingerprint, (0.5,))
    assert back.unreadable == ("a/1",) and back.spikes == (Spike(2, "so", back_to=1),)
    assert (back.total["steps"], back.total["lost_steps"]) == (2.0, 1.0)
    assert TrainState.from_json(json.loads(json.dumps(back.to_json()))) == back


def test_a_row_closes_the_window_and_not_the_total():
    state = TrainState.start(START).advance(BATCH, {"steps": 1.0}).logged().advance(BATCH, {"steps": 1.0})
    assert (state.window, state.total, state.num_rows) == ({"steps": 1.0}, {"steps": 2.0}, 1)


@pytest.mark.parametrize("value", ["", [], {}, {"step": 3}, TrainState.start(START).to_json() | {"more": 1}])
def test_anything_else_is_refused(value: Any):
    with pytest.raises(ConfigError, match="not the state of a run"):
        TrainState.from_json(value)
