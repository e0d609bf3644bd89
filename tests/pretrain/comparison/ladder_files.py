"""The text of a ladder over the synthetic comparison of the tests."""

import math
from collections.abc import Callable

from pretrain.comparison.plan import PlannedRun

LADDER = """
[sizes.d32.optimizer]
learning_rate = 2e-3
[sizes.d32.model]
d_model = 32
[sizes.d64]
budgets = [4, 2]
[sizes.d64.model]
d_model = 64
[budgets]
tokens_per_parameter = [8, 2, 4]
"""


def ladder_edit(ladder: str = LADDER) -> Callable[[str], str]:
    """An edit of the comparison file that makes it a ladder."""
    return lambda text: text + ladder


def falling(run: PlannedRun, modality: str) -> float:
    """A difference of mot to dense that falls over budgets and is zero at 4 tokens per parameter."""
    assert run.cell is not None
    return -0.3 * math.log(run.cell.tokens_per_parameter / 4) * (run.arm == "mot")
