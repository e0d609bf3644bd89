"""The hook alone; tests/numerics/test_refused_step.py has it in engines."""

import pytest
import torch

from parallel.refusal import Refusal


@pytest.mark.parametrize("answer", [True, False, None])
def test_it_asks_once_a_step_and_an_optimizer_passes_over_what_it_drops(answer: bool | None) -> None:
    """As in ZeRO: the optimizer is called for one group after another. None: nobody is asked."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    refusal, asked = Refusal(), []
    optimizer.register_step_pre_hook(refusal.before_update)

    def ask() -> bool:
        asked.append(True)
        return bool(answer)

    whole = optimizer.param_groups
    for _ in range(2):
        refusal.begin(None if answer is None else ask)
        for group in whole:
            optimizer.param_groups = [group]
            group["params"][0].grad = torch.ones(3)
            optimizer.step()
        assert refusal.refused is bool(answer)
    assert len(asked) == (0 if answer is None else 2)
    for group in whole:
        (parameter,) = group["params"]
        assert torch.equal(parameter, torch.ones(3)) is bool(answer)
        assert (parameter in optimizer.state) is not bool(answer)
