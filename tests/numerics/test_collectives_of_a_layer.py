"""What a tensor-parallel layer sends, read off a profiler's trace: towers add no collective."""

import math
from collections import Counter

import pytest
from torch.profiler import ProfilerActivity, profile

from parallel.layout import ParallelConfig
from parallel.world import World
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.one_world import run_cases
from tests.pretrain.models.random_batch import DENSE, MOT, random_batch, tiny_config

NAMES = {
    "c10d::_allgather_base_": "all-gather",
    "c10d::_reduce_scatter_base_": "reduce-scatter",
    # c10d::allreduce_ takes a list of tensors, whose shapes the profiler leaves out.
    "gloo:all_reduce": "all-reduce",
}
D_MODEL, HEAD_DIM, TOKENS, LAYERS = 16, 4, 24, (1, 2)

Sent = dict[str, list[int]]
"""Kind of collective -> elements of each call."""


def _trace(w: World, towers: dict[str, str], layers: int) -> Sent:
    config = tiny_config(towers, num_layers=layers)
    module = Pretraining(Decoder(config, tp=w.tensor_parallel))
    inputs = build_inputs(random_batch(config, seed=1), config)
    assert inputs.num_tokens == TOKENS and config.d_model == D_MODEL and config.head_dim == HEAD_DIM
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as trace:
        module(inputs)[0].backward()
    sent: Sent = {kind: [] for kind in NAMES.values()}
    calls = 0
    for event in trace.events() or ():
        if event.name in NAMES:
            sent[NAMES[event.name]].append(max(math.prod(shape) for shape in event.input_shapes if shape))
        elif event.name.startswith("c10d::"):
            assert event.name == "c10d::allreduce_", f"a collective that is not counted: {event.name}"
            calls += 1
    for elements in sent["reduce-scatter"]:  # gloo makes it of an all-reduce of its own
        sent["all-reduce"].remove(elements)
    assert len(sent["all-reduce"]) == calls
    return sent


def _per_layer(few: Sent, many: Sent) -> dict[str, Counter]:
    """Kind -> elements of a call -> calls, of one block: what a second block adds."""
    added = {kind: Counter(many[kind]) for kind in many}
    for kind, calls in few.items():
        added[kind].subtract(calls)
    return {kind: Counter({n: c for n, c in calls.items() if c}) for kind, calls in added.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_towers_add_no_collective(sequence_parallel: bool) -> None:
    stream = TOKENS * D_MODEL
    cases = [(towers, layers) for towers in (DENSE, MOT) for layers in LAYERS]
    layout = ParallelConfig(tp=2, sequence_parallel=sequence_parallel)
    one, two, *of_mot = (ranks[0] for ranks in run_cases(_trace, 2, cases, layout))
    dense, mot = _per_layer(one, two), _per_layer(*of_mot)
    for sent, towers in ((dense, 1), (mot, 3)):
        # Gradients of norm weights: each rank saw its own heads, or its own chunk. All towers in one sum.
        norms = Counter({towers * 2 * HEAD_DIM: 1})
        if sequence_parallel:
            norms[towers * D_MODEL] += 2
            # Twice before a column-parallel layer, again for its weights' gradient, twice behind a
            # row-parallel layer on the way back.
            assert sent["all-gather"] == {stream: 6}
            assert sent["reduce-scatter"] == {stream: 4}
            assert sent["all-reduce"] == norms
        else:
            assert not sent["all-gather"] and not sent["reduce-scatter"]
            assert sent["all-reduce"] == Counter({stream: 4}) + norms
