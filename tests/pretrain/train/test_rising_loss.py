import pytest

from pretrain.train.rising_loss import FIRST_ROWS, ROWS_ABOVE, stays_above_start, warning

START = [8.0, 7.9, 8.1]


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([909.0] * ROWS_ABOVE, True),
        ([8.01] * ROWS_ABOVE, True),
        ([909.0] * (ROWS_ABOVE - 1), False),  # not for long yet
        ([2.0] * 50 + [9.0] * ROWS_ABOVE, True),  # it had learned, and lost it
        ([9.0] * (ROWS_ABOVE - 1) + [7.99], False),
        ([909.0] * 50 + [7.0] + [909.0] * (ROWS_ABOVE - 1), False),
        ([6.0 - 0.1 * row for row in range(50)], False),
    ],
)
def test_a_loss_that_stays_above_its_start(later: list[float], expected: bool):
    assert stays_above_start([*START, *later]) == expected


def test_few_rows_are_no_reason_to_worry():
    assert not stays_above_start([]) and not stays_above_start(START[:FIRST_ROWS])


def test_the_warning_tells_both_losses_and_what_to_do():
    line = warning([*START, *[909.0] * ROWS_ABOVE], 230)
    assert line.startswith("warning: step 230: ") and "\n" not in line
    assert "909 nats/token" in line and "8 at the start" in line and "optimizer.learning_rate" in line
