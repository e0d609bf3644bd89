"""A module and batches with the engine's contract, small enough to step by hand in a test."""

from dataclasses import dataclass

import torch

from parallel.engine import ParameterGroup

TOWERS = ("text", "image", "speech")


@dataclass(frozen=True)
class ToyBatch:
    """Rows sorted by tower: inputs [n, 8], targets [n] of 5 classes, weights [n]; rows per tower."""

    inputs: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor
    counts: tuple[int, ...]

    @property
    def weight(self) -> float:
        return float(self.weights.sum())

    def to(self, device: torch.device) -> "ToyBatch":
        return ToyBatch(self.inputs.to(device), self.targets.to(device), self.weights.to(device), self.counts)


class Toy(torch.nn.Module):
    """Shared projection, hidden layer per tower, shared head. Stats: loss sums, then weights, per
    tower. Report: rows."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.enter = torch.nn.Linear(8, 16)
        self.hidden = torch.nn.ModuleDict({tower: torch.nn.Linear(16, 16) for tower in TOWERS})
        self.head = torch.nn.Linear(16, 5, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)

    def forward(self, batch: ToyBatch) -> tuple[torch.Tensor, torch.Tensor, int]:
        x = torch.tanh(self.enter(batch.inputs.to(self.enter.weight.dtype)))
        pieces = torch.split(x, batch.counts)
        x = x + torch.cat([self.hidden[tower](piece) for tower, piece in zip(TOWERS, pieces, strict=True)])
        losses = torch.nn.functional.cross_entropy(self.head(x).float(), batch.targets, reduction="none")
        weighted = losses * batch.weights
        sums = [part.sum() for part in torch.split(weighted.detach(), batch.counts)]
        weights = [part.sum() for part in torch.split(batch.weights, batch.counts)]
        return weighted.sum(), torch.stack(sums + weights), len(batch.targets)


def toy_groups(
    module: Toy, *, factors: dict[str, float] | None = None, frozen: str | None = None
) -> list[ParameterGroup]:
    """A decayed and an undecayed group per tower and for the shared parts; the frozen tower has none."""
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        tower = name.split(".")[1] if name.startswith("hidden") else "shared"
        if tower == frozen:
            parameter.requires_grad_(False)
            continue
        kind = "decay" if parameter.ndim > 1 else "no_decay"
        group = groups.setdefault(
            f"{tower}/{kind}",
            ParameterGroup(
                name=f"{tower}/{kind}",
                tower=tower,
                params=[],
                lr_scale=(factors or {}).get(tower, 1.0),
                weight_decay=0.1 if kind == "decay" else 0.0,
            ),
        )
        group["params"].append(parameter)
    return list(groups.values())


def toy_step(step: int, *, dp_size: int, absent: str = "nowhere") -> list[list[ToyBatch]]:
    """The global batch of one step as [dp_rank][micro_batch], 4 micro-batches in all, of different weights.

    `absent`: modality 2 is missing "nowhere", on the "first rank" (of 2) only, or "everywhere".
    """
    generator = torch.Generator().manual_seed(1_000 + step)
    batches = []
    for number in range(4):
        counts = [6 + number, 5, 3 + step % 2]
        # With 2 ranks, rank 0 takes micro-batches 0 and 1.
        if absent == "everywhere" or (absent == "first rank" and number < 2):
            counts[2] = 0
        rows = sum(counts)
        batches.append(
            ToyBatch(
                torch.randn(rows, 8, generator=generator),
                torch.randint(5, (rows,), generator=generator),
                torch.rand(rows, generator=generator) + 0.5 * number,
                tuple(counts),
            )
        )
    per_rank = 4 // dp_size
    return [batches[rank * per_rank : (rank + 1) * per_rank] for rank in range(dp_size)]
