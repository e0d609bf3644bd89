import json
import math

from pretrain.metric_rows import losses, step_sums, train_row
from pretrain.metrics import add


def step_sums_of(**changes):
    values = dict(
        targets={"text": (30.0, 10.0), "image": (8.0, 2.0)},
        tokens=16,
        flops=3e6,
        step_s=0.5,
        wait_s=0.25,
        fill_frac=0.75,
        grad_norm=2.0,
        grad_norm_by_tower={"text": 1.5, "shared": 1.0},
    )
    return step_sums(**(values | changes))


def test_a_row_divides_sums_by_counts_and_never_means_by_means():
    first = step_sums_of()
    targets = {"text": (1.0, 2.0), "image": (100.0, 40.0)}
    second = step_sums_of(targets=targets, grad_norm=4.0, wait_s=0.0, fill_frac=0.25)
    total = add({}, first)
    window = add(add({}, first), second)
    total = add(add(total, second), first)
    row = train_row(window, total, peak_flops=1e7)
    assert row["train/loss"] == 139.0 / 54.0
    assert row["train/loss/text"] == 31.0 / 12.0
    assert row["train/loss/image"] == 108.0 / 42.0
    assert (row["tokens"], row["train/tokens/text"], row["train/tokens/image"]) == (48, 22, 44)
    assert row["optim/grad_norm"] == 3.0
    assert row["optim/grad_norm/shared"] == 1.0
    assert row["time/step_s"] == 0.5
    assert row["time/data_wait_s"] == 0.125
    assert row["time/train_s"] == 1.5 + 0.5
    assert row["speed/tokens_per_s"] == 32 / 1.25
    assert row["speed/mfu_frac"] == 6e6 / (1.25 * 1e7)
    assert row["compute/train_flops"] == 9e6
    assert row["data/fill_frac"] == 0.5


def test_a_modality_without_targets_has_no_loss_and_no_zero():
    sums = add({}, step_sums_of(targets={"text": (30.0, 10.0), "image": (0.0, 0.0)}))
    row = train_row(sums, sums, peak_flops=None)
    assert row["train/loss"] == 3.0
    assert "train/loss/image" not in row
    assert row["train/tokens/image"] == 0
    assert "speed/mfu_frac" not in row
    assert losses({"text": (0.0, 0.0)}, "eval/loss") == {}


def test_losses_of_images_are_means_of_their_own():
    """Text and speech share one mean; an image counts 5 as much as all of them together."""
    targets = {"text": (30.0, 10.0), "image": (8.0, 2.0), "speech": (5.0, 5.0)}
    weights = {"image": 5.0}
    row = losses(targets, "eval/loss", weights)
    assert row["eval/loss"] == 35.0 / 15.0 + 5 * 4.0
    assert (row["eval/loss/text"], row["eval/loss/image"]) == (3.0, 4.0)
    assert losses(targets | {"image": (0.0, 0.0)}, "eval/loss", weights)["eval/loss"] == 35.0 / 15.0
    assert losses({"text": (0.0, 0.0), "image": (8.0, 2.0)}, "eval/loss", weights)["eval/loss"] == 20.0


def test_sums_survive_json_bit_for_bit():
    sums = step_sums_of(targets={"text": (0.1 + 0.2, 10.0), "image": (math.pi, 2.0)}, step_s=1e-17)
    assert json.loads(json.dumps(sums)) == sums
