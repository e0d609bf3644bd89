import io
import random

import numpy as np
import torch

from pretrain.checkpoint.random_states import random_states, set_random_states


def _draw() -> tuple[float, ...]:
    return (
        random.random(),
        random.gauss(),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    )


def test_numbers_go_on_where_the_states_were_taken() -> None:
    _draw()  # gauss and randn keep a second number
    file = io.BytesIO()
    torch.save(random_states(), file)
    file.seek(0)
    expected = _draw()
    _draw()
    set_random_states(torch.load(file, weights_only=True))
    assert _draw() == expected
