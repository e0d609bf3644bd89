import pytest
import torch

from parallel.routing import TowerTokens
from pretrain.models.experts import Router, assign, best_experts, best_tokens
from pretrain.models.experts_config import ExpertsConfig
from tests.pretrain.models.precision import assert_close

EXPERT = ExpertsConfig(num_experts=2)
TOKEN = ExpertsConfig(num_experts=3, routing="token_choice", top_k=2)


def test_experts_take_their_best_of_each_sequence_the_earlier_of_equals() -> None:
    scores = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    assert best_tokens(EXPERT, scores, (3, 2)).tolist() == [[2, 0, 4], [0, 1, 3]]
    assert best_tokens(EXPERT, scores[:0], (0, 0)).shape == (2, 0)


def test_tokens_take_their_best_experts_the_first_of_equals() -> None:
    scores = torch.tensor([[0.2, 0.2, 0.6], [0.3, 0.4, 0.3]])
    assert best_experts(TOKEN, scores).tolist() == [[2, 0], [1, 0]]


def test_padding_is_passed_over() -> None:
    """Of rows 0 ... 6 of a tower's slice 2 and 5 are padding."""
    tokens = TowerTokens(torch.tensor([0, 1, 3, 4, 6]), (2, 3))
    logits = torch.tensor([[1.0, 0], [0, 1], [5, 0], [4, 0], [0, 4]])
    choice = assign(EXPERT, logits, tokens)
    # Capacities 1 and 2: the second expert's second of the second sequence is row 4, its 4 beating 5.
    assert [rows.tolist() for rows in choice.assignment.rows] == [[0, 3, 4], [1, 6, 4]]
    assert choice.assignment.counts == (3, 3) and choice.assignment.ends.tolist() == [3, 6]
    p = logits.softmax(1)
    assert torch.equal(choice.gates, torch.stack([p[0, 0], p[2, 0], p[3, 0], p[1, 1], p[4, 1], p[3, 1]]))
    assert choice.counts.taken.tolist() == [3, 3] and choice.counts.dropped == 0
    assert choice.counts.tokens == 5 and choice.counts.histogram.sum(1).tolist() == [5, 5]


@pytest.mark.parametrize("on_device", [False, True])
def test_token_choice_drops_none_and_its_gates_add_up(on_device: bool) -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    choice = assign(TOKEN, logits, TowerTokens(None, (30, 20)), counts_on_device=on_device)
    assert (choice.assignment.counts is None) == on_device
    rows = torch.cat(choice.assignment.rows)
    assert rows.bincount(minlength=50).tolist() == [2] * 50
    sums = torch.zeros(50).index_add_(0, rows, choice.gates)
    torch.testing.assert_close(sums, torch.ones(50))
    assert choice.counts.dropped == 0 and choice.counts.taken.sum() == 100
    for e, of_expert in enumerate(rows.tensor_split(choice.assignment.ends[:-1].tolist())):
        assert len(of_expert) == choice.counts.taken[e] and len(set(of_expert.tolist())) == len(of_expert)


def test_tokens_that_no_expert_takes_are_counted() -> None:
    choice = assign(EXPERT, torch.tensor([[9.0, 9], [8, 8], [0, 0], [0, 0]]), TowerTokens(None, (4,)))
    # All have equal probabilities: both take the first two.
    assert choice.counts.taken.tolist() == [2, 2] and choice.counts.dropped == 2


def test_by_thresholds_each_token_is_judged_by_itself() -> None:
    logits = torch.tensor([[2.0, 0], [0, 2], [1, 1], [0, 0]])
    log_p = logits.log_softmax(1)
    thresholds = [float(log_p[2, 0]), float(log_p[1, 1])]
    choice = assign(EXPERT, logits, TowerTokens(None, (2, 2)), thresholds=thresholds)
    assert [rows.tolist() for rows in choice.assignment.rows] == [[0, 2, 3], [1]]
    assert torch.equal(choice.gates, torch.stack([log_p[0, 0], log_p[2, 0], log_p[3, 0], log_p[1, 1]]).exp())
    alone = assign(EXPERT, logits[:1], TowerTokens(None, (1,)), thresholds=thresholds)
    assert [rows.tolist() for rows in alone.assignment.rows] == [[0], []]
    everything = assign(EXPERT, logits, TowerTokens(None, (4,)), thresholds=[-torch.inf] * 2).counts
    assert everything.taken.tolist() == [4, 4] and everything.dropped == 0


def test_an_even_load_has_the_least_loss() -> None:
    """1 per token where choices and probabilities are even, num_experts where all go to one."""
    config = ExpertsConfig(num_experts=4, routing="token_choice", load_balance=0.5)
    even = 20 * torch.eye(4).repeat(3, 1)
    one = even[:1].expand(12, 4)
    found = [assign(config, x, TowerTokens(None, (8, 4))).counts for x in (even, one)]
    assert [float(counts.load_balance) for counts in found] == pytest.approx([12, 12 * 4])
    assert not any(counts.router_z for counts in found)  # it has no weight


def test_scores_do_not_depend_on_the_scale_of_the_stream() -> None:
    router = Router({"a": 3}, 8, 1e-12, lambda w, _: w.normal_()).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    (logits,), (scaled,) = router([x]), router([100 * x])
    assert_close(scaled, logits, "logits")
    assert_close(
        logits,
        (x / x.square().mean(1, keepdim=True).sqrt()) @ router.weight["a"].t(),
        "logits of their definition",
    )
