"""The state that a spec makes before the first update is of the kind that torch makes."""

import torch

from parallel.adamw import adamw


def test_new_states_are_shaped_and_typed_as_torch_makes_them() -> None:
    spec = adamw(beta1=0.9, beta2=0.95, eps=1e-8)
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = spec.build([{"params": [parameter], "lr": 1e-3, "weight_decay": 0.0}])
    parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    made, ours = optimizer.state[parameter], spec.new_state(parameter, {})
    assert ours.keys() == made.keys() == {*spec.states, *spec.counters}
    for name, value in ours.items():
        assert (value.shape, value.dtype) == (made[name].shape, made[name].dtype) and not value.any()
    assert made["exp_avg"].allclose(torch.full((3, 2), 0.2))  # (1 - beta1) times the gradient
    assert spec.state_bytes() == 8
