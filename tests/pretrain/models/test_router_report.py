"""What routers report: sums by name over layers and micro-batches, through one vector and back."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.router_report import (
    BINS,
    RouterReport,
    bin_edges,
    bin_of,
    no_counts,
    score_histogram,
)
from tests.pretrain.models.random_batch import MOT, random_batch, tiny_config

TABLE = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}
CONFIG = tiny_config(
    MOT,
    context_tokens=40,
    depth={"speech": TABLE, "text": TABLE},
    experts={
        "speech": {"num_experts": 3, "routing": "token_choice", "top_k": 2, "router_z": 0.1},
        "text": {"num_experts": 4},
    },
)


def report(seed: int = 0, *, report_ran: bool = False, checkpointing: bool = False) -> RouterReport:
    module = Pretraining(Decoder(CONFIG, activation_checkpointing=checkpointing))
    inputs = replace(build_inputs(random_batch(CONFIG, seed=seed), CONFIG), report_ran=report_ran)
    objective, _, found = module(inputs)
    objective.backward()
    return found


def test_a_report_goes_through_a_vector_and_back_by_name() -> None:
    whole = no_counts(CONFIG) + report().on_host()
    back = no_counts(CONFIG).unpack(whole.pack())
    for layer, block in report().layers.items():
        assert int(back.layers[layer].visible_pairs) == int(block.visible_pairs) > 0
        for modality, depth in block.depth.items():
            for name, value in vars(depth).items():
                assert torch.equal(getattr(back.layers[layer].depth[modality], name), value.double()), name
        for tower, experts in block.experts.items():
            for name, value in vars(experts).items():
                assert torch.equal(getattr(back.layers[layer].experts[tower], name), value.double()), name
    assert back.layers[1].experts["speech"].histogram.shape == (3, 0)  # token choice needs no thresholds


def test_the_vectors_order_is_the_models_whatever_the_reports_is() -> None:
    """A stage reports some layers, and routers in the order of their towers."""
    (first, second) = report().on_host().layers.items()
    other = {"text": second[1].depth["text"], "speech": second[1].depth["speech"]}
    turned = RouterReport({1: replace(second[1], depth=other)}) + RouterReport({0: first[1]})
    straight = no_counts(CONFIG) + RouterReport(dict([first, second]))
    assert torch.equal((no_counts(CONFIG) + turned).pack(), straight.pack())


def test_a_sum_adds_counts_and_joins_what_ran() -> None:
    a, b = (report(seed, report_ran=True) for seed in (1, 2))
    both = a + b
    for layer in (0, 1):
        one, two, total = (each.layers[layer] for each in (a, b, both))
        assert int(total.depth["text"].run) == int(one.depth["text"].run) + int(two.depth["text"].run)
        assert torch.equal(total.experts["text"].taken, one.experts["text"].taken + two.experts["text"].taken)
        assert len(total.ran) == 2 and np.array_equal(total.ran[1], two.ran[0])
    assert (a + RouterReport({})).pack().equal(a.pack())


def test_which_tokens_ran_is_reported_where_asked_for() -> None:
    batch = random_batch(CONFIG, seed=0)
    asked, plain = report(report_ran=True), report()
    for layer, block in asked.layers.items():
        (ran,) = block.ran
        assert plain.layers[layer].ran == () and ran.shape == batch.input_ids.shape
        for index, modality in enumerate(CONFIG.modalities):
            ids = (batch.input_modality == index) & (batch.document_ids >= 0)
            if modality in CONFIG.depth:
                free = ids & (batch.input_ids >= 7)
                assert ran[free].sum() == int(block.depth[modality].run) < free.sum()
            else:
                assert ran[ids].all()


def test_recomputation_counts_once_and_a_report_has_no_graph() -> None:
    kept, recomputed = report(), report(checkpointing=True)
    assert torch.equal(kept.pack(), recomputed.pack())
    assert not kept.pack().requires_grad


def test_scores_lie_in_their_bins_and_beyond_the_range_in_the_outer_ones() -> None:
    histogram = score_histogram(torch.tensor([[-1e9, 1e9, 0.0], [0.3, 0.3, -0.3]]))
    assert histogram[0, 0] == histogram[0, -1] == histogram[0, BINS // 2] == 1
    assert histogram.sum(-1).tolist() == [3, 3]
    (index,) = np.flatnonzero(histogram[1] == 2).tolist()
    left, right = bin_edges(index)
    assert left <= 0.3 < right and bin_of(left) == pytest.approx(index, abs=1e-6)
