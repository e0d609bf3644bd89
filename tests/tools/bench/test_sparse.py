from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.accounting import TRAIN_FACTOR, flops_per_pair
from pretrain.models.config import ModelConfig
from tools.bench.model import BASELINE, Case, Row, model_pass, random_batch
from tools.bench.sparse import Promise, _ledger, configs, settled, table, variants

CPU = torch.device("cpu")
DECODER = Case(num_layers=2, d_model=16, num_heads=2, sequences=2, context_tokens=64, vocab_tokens=24)
BLOCK = replace(DECODER, num_layers=None)


@pytest.mark.parametrize("case", [BLOCK, DECODER], ids=["block", "decoder"])
def test_what_runs_is_what_was_asked_for(case: Case) -> None:
    """128 tokens, 64 a document: a threshold lies inside a bin of 1.2 %, and top_k takes whole tokens."""
    _, promises = variants(case, CPU)
    assert set(promises) == set(configs(case))
    for name, promise in promises.items():
        what, _, asked = name.partition(" ")
        if what == "depth":
            ratio = float(asked.split(",")[0])
            assert promise.ran == pytest.approx(ratio, abs=3 / 64), name
            assert promise.flops_ratio < 1 or ratio == 1, name
    assert promises[BASELINE] == Promise(1.0, 1.0)
    assert promises["depth 1"] == Promise(1.0, 1.0)
    # Keys that are not computed, and pairs with them.
    assert promises["depth 0.25, selected keys"].flops_ratio < promises["depth 0.25"].flops_ratio
    assert promises["experts, 4 choose"].ran == promises["experts, 1 of 4, pre"].ran == 1.0
    assert promises["experts, 2 of 4"].ran == 2.0


@pytest.mark.parametrize("name", [BASELINE, "depth 0.25, selected keys", "experts, 2 of 4"])
def test_flops_are_those_of_the_timed_pass(name: str) -> None:
    """torch's counter sees products as they run, but not attention, whose CPU kernels it does not know. A
    router's own product (2 d_model a token) is not in the ledger."""
    config = configs(BLOCK)[name]
    inputs, report, run, module = _settled(BLOCK, config)
    ours, _ = _ledger(BLOCK, config, inputs, report)
    with FlopCounterMode(display=False) as counter:
        run(module, inputs)
    counts = counter.get_flop_counts()["Global"]
    products = sum(flops for op, flops in counts.items() if "attention" not in str(op))
    pairs = inputs.visible_pairs
    if config.depth:
        pairs = int(report.layers[0].visible_pairs)
    ours -= pairs * flops_per_pair(config)
    router = 2 * BLOCK.d_model * 128 if config.depth else 0
    # The counter does not know all of its operators.
    assert TRAIN_FACTOR * ours <= products <= TRAIN_FACTOR * (ours + router)


def test_a_later_layer_is_settled_on_what_the_first_let_through() -> None:
    config = configs(DECODER)["depth 0.25"]
    _, report, _, _ = _settled(DECODER, config)
    for layer in range(2):
        counts = report.layers[layer].depth["text"]
        assert counts.tokens == 128 and float(counts.run) == pytest.approx(32, abs=3), layer


def _settled(case: Case, config: ModelConfig):
    module, inputs, run = model_pass(case, config, random_batch(case, 1), CPU)
    inputs, report = settled(module, inputs, run, config)
    return inputs, report, run, module


def test_table_aligns() -> None:
    row = Row("depth 0.25, selected keys", 131.25, (120.0, 140.5), 0.231, (0.2, 0.3))
    head, line = table([row], {row.variant: Promise(0.25, 0.21)}).splitlines()
    assert len(head) == len(line)
    assert "131.25" in line and "1.100" in line
