"""The states that the spec makes before the first update are of the kind that the optimizer makes."""

import torch

from parallel.muon import MuonSettings, muon


def test_new_states_are_those_of_matrices_and_of_all_else() -> None:
    settings = MuonSettings(momentum=0.9, nesterov=True, ns_steps=5, eps=1e-7, adjust_lr="original")
    spec = muon(settings, beta1=0.9, beta2=0.95, eps=1e-8)
    matrix, vector = torch.nn.Parameter(torch.ones(4, 2)), torch.nn.Parameter(torch.ones(3))
    shared = {"lr": 1e-3, "weight_decay": 0.0}
    groups = [
        {"name": "matrices", "params": [matrix], "pieces": [(2, 2)], **shared},
        {"name": "others", "params": [vector], **shared},
    ]
    optimizer = spec.build(groups, None)
    for parameter in (matrix, vector):
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()
    for parameter, group, names in (
        (matrix, groups[0], spec.matrix_states), (vector, groups[1], spec.states),
    ):  # fmt: skip
        made, ours = optimizer.state[parameter], spec.new_state(parameter, group)
        assert ours.keys() == made.keys() == {*names, *spec.counters}
        for name, value in ours.items():
            assert (value.shape, value.dtype) == (made[name].shape, made[name].dtype) and not value.any()
        assert made["step"] == 1
    assert optimizer.state[matrix]["momentum_buffer"].allclose(torch.full((4, 2), 0.2))
    assert (spec.state_bytes(), spec.state_bytes(matrices=True)) == (8, 4)
