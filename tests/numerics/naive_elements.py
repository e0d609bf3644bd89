"""LayerNorm, biases, scaled RoPE and dropout token by token, on the reference of naive_depth.py: loops in
fp64 and arithmetic of Python's numbers that share no code with the model."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.models.rope_config import RopeScalingConfig
from tests.numerics.naive_depth import NaiveDepth
from tests.numerics.naive_mot import turned


class NaiveElements(NaiveDepth):
    """`sequences`: numbers in the global batch of the sequences whose logits are asked for, in turn; without
    them nothing is dropped."""

    sequences: Sequence[int] = ()
    seed, step = 0, 0

    def _weight(self, layer: str, part: str, modality: int) -> Tensor:
        """Of LayerNorm the weight and the bias, as two rows."""
        weight = super()._weight(layer, part, modality)
        tower = list(self.config.towers.values())[modality]
        bias = self.weights.get(f"{layer}.bias.{tower if part in self.config.untied else 'shared'}")
        return weight if bias is None or weight.dim() == 2 else torch.stack((weight, bias))

    def _norm(self, x: Tensor, weight: Tensor, eps: float | None = None) -> Tensor:
        eps = self.config.norm_eps if eps is None else eps
        if weight.dim() == 1:
            return x / torch.sqrt((x * x).mean() + eps) * weight
        x = x - x.mean()
        return x / torch.sqrt((x * x).mean() + eps) * weight[0] + weight[1]

    def _project(self, x: Tensor, layer: str, modality: int, position: int) -> tuple[list, list, list]:
        c = self.config
        features = self._weight(f"{layer}.qkv", "attention", modality) @ x
        if c.qkv_bias:
            tower = list(c.towers.values())[modality]
            shard = tower if "attention" in c.untied else "shared"
            features = features + self.weights[f"{layer}.qkv.bias.{shard}"]
        rows = features.split(c.head_dim)
        queries, keys = rows[: c.num_heads], rows[c.num_heads : -c.kv_heads]
        if c.qk_norm:
            both = self._weight(f"{layer}.qk", "attention", modality)
            for_queries, for_keys = both[..., : c.head_dim], both[..., c.head_dim :]
            eps = c.norm_eps if c.qk_norm_eps is None else c.qk_norm_eps
            queries = [self._norm(q, for_queries, eps) for q in queries]
            keys = [self._norm(k, for_keys, eps) for k in keys]
        placed = ([self._rope(each, position) for each in of] for of in (queries, keys))
        return (*placed, list(rows[-c.kv_heads :]))

    def _rope(self, x: Tensor, position: int) -> Tensor:
        size, frequencies = magnitude(self.config.rope_scaling), []
        for i in range(0, len(x), 2):
            frequency = self.config.rope_theta ** (-i / len(x))
            if (scaling := self.config.rope_scaling) is not None:
                frequency = scaled(frequency, i // 2, len(x), self.config.rope_theta, scaling)
            frequencies.append(frequency)
        cosines = [size * math.cos(position * frequency) for frequency in frequencies]
        return turned(x, cosines, [size * math.sin(position * frequency) for frequency in frequencies])

    def sequence_logits(
        self, ids: list[int], modality: list[int], position: list[int], document: list[int]
    ) -> Tensor:
        if self.sequences:
            self.sequence, *self.sequences = self.sequences
        c, embedding = self.config, self.weights["embedding.weight.shared"]
        xs = self._drop({n: embedding[i] for n, i in enumerate(ids)}, "embedding", c.embedding_dropout)
        rows, self.ran = list(xs.values()), []
        for index in range(c.num_layers):
            rows = self._block(index, rows, ids, modality, position, document)
        final = [
            self._norm(x, self._weight("final_norm", "norm", m)) for x, m in zip(rows, modality, strict=True)
        ]
        return torch.stack([self.weights["head.weight.shared"] @ x for x in final])

    def _attended(self, index: int, *args: Any) -> dict[int, Tensor]:
        added = super()._attended(index, *args)
        return self._drop(added, f"blocks.{index}.attention", self.config.dropout)

    def _fed(self, index: int, *args: Any) -> dict[int, Tensor]:
        added = super()._fed(index, *args)
        return self._drop(added, f"blocks.{index}.feed_forward", self.config.dropout)

    def _drop(self, rows: Mapping[int, Tensor], place: str, rate: float) -> dict[int, Tensor]:
        """`rows`: by offset in the sequence."""
        if not rate:
            return dict(rows)
        name, first = f"{self.seed}/{self.step}/{place}", self.sequence * self.config.context_tokens
        kept = {
            i: torch.tensor([not is_dropped(first + i, f, rate, name) for f in range(len(x))])
            for i, x in rows.items()
        }
        return {i: torch.where(kept[i], x / (1 - rate), 0.0) for i, x in rows.items()}


def is_dropped(token: int, feature: int, rate: float, name: str) -> bool:
    """The mask that pretrain/models/dropout.py says, of one feature, in Python's integers."""
    digest = hashlib.sha256(name.encode()).digest()

    def word(number: int, key: bytes) -> int:
        x = (number * 0x9E3779B97F4A7C15 + int.from_bytes(key, "little")) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) % 2**32

    x = (word(token, digest[:8]) ^ word(feature, digest[8:16])) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return (x + 2**31) % 2**32 < round(rate * 2**32)


def magnitude(scaling: RopeScalingConfig | None) -> float:
    """Of yarn's queries and keys."""
    return 0.1 * math.log(scaling.factor) + 1 if scaling and scaling.kind == "yarn" else 1.0


def scaled(frequency: float, pair: int, head_dim: int, theta: float, scaling: Any) -> float:
    """The frequency of a pair, from the papers that pretrain/models/rope_config.py names."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    turns = scaling.original_context_tokens * frequency / (2 * math.pi)
    if scaling.kind == "llama3":
        if turns < scaling.low_freq_factor:
            return frequency / scaling.factor
        if turns > scaling.high_freq_factor:
            return frequency
        share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return (1 - share) * frequency / scaling.factor + share * frequency

    def pair_that_turns(times: float) -> float:
        turns_of_first_pair = scaling.original_context_tokens / (2 * math.pi)
        return head_dim / 2 * math.log(turns_of_first_pair / times) / math.log(theta)

    fast, slow = max(0, math.floor(pair_that_turns(32))), min(head_dim - 1, math.ceil(pair_that_turns(1)))
    share = 0.0 if pair <= fast else 1.0 if pair >= slow else (pair - fast) / (slow - fast)
    return share * frequency / scaling.factor + (1 - share) * frequency
