"""Depth routing token by token, from the papers (pretrain/models/depth_config.py names them): loops in fp64
that share no code with the model but the schedules, which have tests of their own. Experts as in MoMa (arXiv
2407.21770), staged: they are chosen among the tokens that run."""

from collections.abc import Mapping
from math import sqrt

import torch
from torch import Tensor

from pretrain.models.config import ModelConfig
from tests.numerics.naive_experts import NaiveExperts

SPECIAL_IDS = 7


class NaiveDepth(NaiveExperts):
    """Of one sequence at a time. `thresholds`: place -> value, where the rule asks for them. `causal`: they
    choose whatever the rules, of depth and of experts. `document_mask` = False: attention looks beyond
    documents; choices and softmax gates do not."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        thresholds: Mapping[str, float],
        causal: bool = False,
        document_mask: bool = True,
    ) -> None:
        super().__init__(config, weights)
        self.thresholds, self.causal, self.document_mask = thresholds, causal, document_mask
        self.ran: list[dict[int, bool]] = []
        """Of the last sequence, block by block: does the token run."""
        self.routed_pairs = 0
        """(query, key) pairs that routed blocks have looked at, queries of padding left out."""

    def sequence_logits(
        self, ids: list[int], modality: list[int], position: list[int], document: list[int]
    ) -> Tensor:
        xs = [self.weights["embedding.weight.shared"][i] for i in ids]
        self.ran = []
        tokens = (ids, modality, position, document)
        for index in range(self.config.num_layers):
            xs = self._block(index, xs, *tokens)
        head = self.weights["head.weight.shared"]
        return torch.stack(
            [
                head @ self._norm(x, self._weight("final_norm", "norm", m))
                for x, m in zip(xs, modality, strict=True)
            ]
        )

    def _block(
        self, index: int, xs: list[Tensor], ids: list[int], modality: list[int], position: list[int],
        document: list[int],
    ) -> list[Tensor]:  # fmt: skip
        names, everyone = list(self.config.towers), range(len(xs))
        ratios = {m: d.ratios(self.config.num_layers)[index] for m, d in self.config.depth.items()}
        routed = {i for i in everyone if ratios.get(names[modality[i]]) is not None}
        if not any(ratio is not None for ratio in ratios.values()):
            attended = self._attended(index, xs, everyone, everyone, modality, position, document)
            xs = [xs[i] + attended[i] for i in everyone]
            fed = self._fed(index, dict(enumerate(xs)), modality, document)
            return [xs[i] + fed[i] for i in everyone]
        style = self.config.depth_block
        if style.parts == "feed_forward":
            attended = self._attended(index, xs, everyone, everyone, modality, position, document)
            xs = [xs[i] + attended[i] for i in everyone]
        scores = {i: self._score(index, xs[i], names[modality[i]]) for i in routed}
        gate = {
            i: self._gate(names[modality[i]], scores, [
                j for j in routed if modality[j] == modality[i] and document[j] == document[i]
            ], i) if i in routed else torch.ones((), dtype=torch.float64)
            for i in everyone
        }  # fmt: skip
        run = {i: True for i in everyone}
        for name, ratio in ratios.items():
            if ratio is not None:
                run |= self._choose(index, name, ratio, scores, ids, modality, document)
        self.ran.append(run)
        chosen = [i for i in everyone if run[i]]
        added, middle = {}, dict(enumerate(xs))
        if style.parts != "feed_forward":
            keys = everyone if style.keys == "all" else chosen
            added = self._attended(index, xs, chosen, keys, modality, position, document)
            self.routed_pairs += self.pairs
            middle |= {i: xs[i] + added[i] for i in chosen}
        every_fed = self._fed(index, {i: middle[i] for i in chosen}, modality, document)
        out = []
        for i in everyone:
            if not run[i]:
                out.append(xs[i] if style.scale == "selected" else gate[i] * xs[i])
                continue
            fed = every_fed[i]
            if style.scale == "selected":
                out.append(xs[i] + gate[i] * (added.get(i, 0.0) + fed))
            elif style.scale == "all":
                out.append(gate[i] * (middle[i] + fed))
            else:
                out.append(middle[i] + gate[i] * fed)
        return out

    def _score(self, index: int, x: Tensor, name: str) -> Tensor:
        weight = self.weights[f"blocks.{index}.depth.{name}.weight.{self.config.towers[name]}"]
        return weight @ (x / torch.sqrt((x * x).mean() + self.config.norm_eps)) / len(x)

    def _gate(self, name: str, scores: dict[int, Tensor], alike: list[int], i: int) -> Tensor:
        config = self.config.depth[name]
        share = scores[i].exp() / sum(scores[j].exp() for j in alike)
        return {
            "tanh": 1 + config.alpha * torch.tanh(scores[i]),
            "sigmoid": 1 / (1 + (-scores[i]).exp()),
            "softmax": share,
            "shifted_softmax": 1 + share,
            "none": torch.ones((), dtype=torch.float64),
        }[config.gate]

    def _choose(
        self, index: int, name: str, ratio: float, scores: dict[int, Tensor], ids: list[int],
        modality: list[int], document: list[int],
    ) -> dict[int, bool]:  # fmt: skip
        config = self.config.depth[name]
        mine = [i for i in range(len(ids)) if modality[i] == list(self.config.towers).index(name)]
        run = {i: document[i] >= 0 and ids[i] < SPECIAL_IDS for i in mine}
        threshold = self.thresholds.get(f"blocks.{index}.depth.{name}", -float("inf"))
        for d in {document[i] for i in mine if document[i] >= 0}:
            free = [i for i in mine if document[i] == d and not run[i]]
            if self.causal or config.rule == "threshold":
                run |= {i: scores[i].item() >= threshold for i in free}
            else:
                best = sorted(free, key=lambda i: (-scores[i].item(), i))
                run |= {i: True for i in best[: int(len(free) * ratio + 1e-9)]}
        return run

    def _attended(
        self, index: int, xs: list[Tensor], queries: list[int] | range, keys: list[int] | range,
        modality: list[int], position: list[int], document: list[int],
    ) -> dict[int, Tensor]:  # fmt: skip
        c, layer = self.config, f"blocks.{index}.attention"
        pre = c.norm_placement == "pre"

        def norm(x: Tensor, i: int) -> Tensor:
            return self._norm(x, self._weight(f"{layer}_norm", "norm", modality[i]))

        projected = {
            i: self._project(norm(xs[i], i) if pre else xs[i], layer, modality[i], position[i])
            for i in {*queries, *keys}
        }
        found, self.pairs = {}, 0
        for i in queries:
            seen = [j for j in keys if j <= i and (document[j] == document[i] or not self.document_mask)]
            self.pairs += len(seen) * (document[i] >= 0)
            heads = []
            for head in range(c.num_heads):
                group = head // (c.num_heads // c.kv_heads)
                q = projected[i][0][head]
                shares = (torch.stack([projected[j][1][group] for j in seen]) @ q / sqrt(c.head_dim)).exp()
                values = torch.stack([projected[j][2][group] for j in seen])
                heads.append((shares / shares.sum()) @ values)
            out = self._weight(f"{layer}.out", "attention", modality[i]) @ torch.cat(heads)
            found[i] = out if pre else norm(out, i)
        return found

    def _fed(
        self, index: int, xs: Mapping[int, Tensor], modality: list[int], document: list[int]
    ) -> dict[int, Tensor]:
        layer = f"blocks.{index}.feed_forward"
        pre = self.config.norm_placement == "pre"

        def norm(x: Tensor, i: int) -> Tensor:
            return self._norm(x, self._weight(f"{layer}_norm", "norm", modality[i]))

        made = self._feed_forwards(
            [norm(x, i) if pre else x for i, x in xs.items()],
            layer,
            [modality[i] for i in xs],
            [document[i] for i in xs],
        )
        return {i: y if pre else norm(y, i) for i, y in zip(xs, made, strict=True)}
