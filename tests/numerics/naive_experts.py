"""Experts token by token, on the reference of naive_mot.py: expert choice as in arXiv 2202.09368, section
3.2, within one tower's tokens of a sequence; token choice as in arXiv 2101.03961, section 2.1, of k
experts; thresholds for expert choice as in arXiv 2603.11535."""

from collections.abc import Mapping
from math import ceil, inf

import torch
from torch import Tensor

from data_pipeline.stream.batch import Batch
from tests.numerics.naive_mot import NaiveMoT


class NaiveExperts(NaiveMoT):
    thresholds: Mapping[str, float] = {}
    """Place -> value, where they choose instead of experts: `causal`."""
    causal = False
    auxiliary = 0.0
    """Of the sequences since it was last set to 0."""

    def _expert(self, x: Tensor, layer: str, shard: str, expert: int) -> Tensor:
        gate, up = (self.weights[f"{layer}.gate_up.weight.{shard}"][expert] @ x).chunk(2)
        return self.weights[f"{layer}.down.weight.{shard}"][expert] @ (gate / (1 + (-gate).exp()) * up)

    def _feed_forwards(
        self, xs: list[Tensor], layer: str, modality: list[int], document: list[int]
    ) -> list[Tensor]:
        towers = [list(self.config.towers.values())[m] for m in modality]
        outputs = [
            torch.zeros_like(x) if tower in self.config.experts else self._feed_forward(x, layer, m)
            for x, m, tower in zip(xs, modality, towers, strict=True)
        ]
        for tower, experts in self.config.experts.items():
            shard = tower if "feed_forward" in self.config.untied else "shared"
            tokens = [i for i in range(len(xs)) if towers[i] == tower and document[i] >= 0]
            router = self.weights[f"{layer}.router.weight.{shard}"]
            logits = {
                i: router @ (xs[i] / torch.sqrt((xs[i] * xs[i]).mean() + self.config.norm_eps))
                for i in tokens
            }
            p = {i: logits[i].exp() / logits[i].exp().sum() for i in tokens}
            for i in tokens:
                self.auxiliary = self.auxiliary + experts.router_z * logits[i].exp().sum().log() ** 2
            number, n = experts.num_experts, len(tokens)
            if experts.routing == "expert_choice":
                for e in range(number):
                    best = sorted(tokens, key=lambda i: (-float(p[i][e]), i))
                    taken = best[: ceil(n * experts.capacity_factor / number)]
                    if self.causal:
                        place = f"{layer.rpartition('.')[0]}.experts.{tower}.{e}"
                        lowest = self.thresholds.get(place, -inf)
                        taken = [i for i in tokens if float(p[i][e].log()) >= lowest]
                    for i in taken:
                        outputs[i] = outputs[i] + p[i][e] * self._expert(xs[i], layer, shard, e)
                continue
            chosen = {
                i: sorted(range(number), key=lambda e: (-float(p[i][e]), e))[: experts.top_k] for i in tokens
            }
            for i in tokens:
                whole = sum(p[i][e] for e in chosen[i]) if experts.top_k > 1 else 1.0
                for e in chosen[i]:
                    outputs[i] = outputs[i] + p[i][e] / whole * self._expert(xs[i], layer, shard, e)
            for e in range(number):
                if n and experts.load_balance:
                    share = sum(e in chosen[i] for i in tokens) / (n * experts.top_k)
                    mean = sum(p[i][e] for i in tokens) / n
                    self.auxiliary = self.auxiliary + experts.load_balance * n * number * share * mean
        return outputs

    def objective(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.auxiliary = 0.0
        total, logits = super().objective(batch)
        return total + self.auxiliary, logits
