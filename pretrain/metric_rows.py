"""What a row of metrics says of steps, from sums over them (pretrain/metrics.py). Imports no torch."""

from collections.abc import Mapping
from typing import Any

from pretrain.metrics import MASKED, STEP_KEYS, Sums
from pretrain.models import modality_sums


def step_sums(
    *,
    targets: Mapping[str, tuple[float, float]],
    tokens: int,
    flops: float,
    step_s: float,
    wait_s: float,
    fill_frac: float,
    grad_norm: float,
    grad_norm_by_tower: Mapping[str, float],
    masked_targets: float = 0.0,
) -> Sums:
    """The Sums of one optimizer step over all ranks: nats and targets per modality, slots, FLOPs, seconds.

    `targets`: modality -> (sum of nats, weight).
    """
    sums = dict(zip(STEP_KEYS, (1.0, tokens, flops, step_s, wait_s, fill_frac, grad_norm), strict=True))
    sums |= {MASKED: masked_targets} if masked_targets else {}
    sums |= {f"loss/{m}": nats for m, (nats, _) in targets.items()}
    sums |= {f"weight/{m}": weight for m, (_, weight) in targets.items()}
    return sums | {f"grad_norm/{tower}": value for tower, value in grad_norm_by_tower.items()}


def train_row(
    window: Mapping[str, float],
    total: Mapping[str, float],
    *,
    peak_flops: float | None,
    image_weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The training metrics of a row.

    `window`: sums since the last row; `total`: sums since step 0; `peak_flops`: FLOP/s of all devices
    together; `image_weights`: as of losses. A modality without a target in the window has no loss in the row,
    rather than a 0, and a window of lost steps alone has none at all. Norms are means over the steps that
    were applied.
    """
    modalities = [name.removeprefix("weight/") for name in total if name.startswith("weight/")]
    steps, train_s = window["steps"], window["step_s"] + window["wait_s"]
    applied = steps - window.get("lost_steps", 0.0)
    row: dict[str, float] = {"tokens": int(total["tokens"])}
    pairs = {m: (window.get(f"loss/{m}", 0.0), window.get(f"weight/{m}", 0.0)) for m in sorted(modalities)}
    row |= losses(pairs, "train/loss", image_weights)
    row |= {f"train/tokens/{m}": int(total[f"weight/{m}"]) for m in sorted(modalities)}
    row |= {
        f"optim/{name}": window[name] / applied
        for name in sorted(window)
        if name.partition("/")[0] == "grad_norm"
    }
    row |= {
        "time/step_s": window["step_s"] / steps,
        "time/data_wait_s": window["wait_s"] / steps,
        "time/train_s": total["step_s"] + total["wait_s"],
        "speed/tokens_per_s": window["tokens"] / train_s,
        "compute/train_flops": total["flops"],
        "data/fill_frac": window["fill"] / steps,
    }
    if peak_flops is not None:
        row["speed/mfu_frac"] = window["flops"] / (train_s * peak_flops)
    return row


def losses(
    sums: Mapping[str, tuple[float, float]], prefix: str, image_weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Losses as `prefix` (all modalities) and `prefix/<m>`, from (sum of nats, count) by modality.

    A modality with a count of 0 is left out. `image_weights`: as RunConfig has them; None: there are none.
    """
    value = modality_sums.objective(sums, image_weights or {})
    row = {} if value is None else {prefix: value}
    return row | {f"{prefix}/{m}": value / weight for m, (value, weight) in sums.items() if weight}


def inherited_row(record: Mapping[str, Any]) -> dict[str, float]:
    """Return what a row says of a run's trunk, from the run's record; {} for a run without one."""
    if "branch" not in record:
        return {}
    costs = record["branch"]["inherited"]
    return {
        "train/inherited_tokens": costs["tokens"],
        "compute/inherited_flops": costs["flops"],
        "time/inherited_s": costs["seconds"],
    }
