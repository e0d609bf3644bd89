"""Mixture-of-Transformers token by token, from Algorithm 1 of arXiv 2411.04996: a reference that shares no
code with the model. Everything is a loop in fp64; nothing is sorted, fused, batched or masked."""

from collections.abc import Mapping, Sequence
from math import cos, sin, sqrt

import torch
from torch import Tensor

from data_pipeline.stream.batch import Batch
from pretrain.models.config import ModelConfig

_SHORTHAND = {
    "qkv": "attention", "qk_norm": "attention", "attention_out": "attention",
    "block_norm": "norm", "final_norm": "norm",
}  # fmt: skip
"""Part -> the name in `untied` that stands for it and others."""


def turned(x: Tensor, cosines: Sequence[float], sines: Sequence[float]) -> Tensor:
    """Each pair (x[2k], x[2k + 1]) turned by its angle."""
    even, odd = x[0::2], x[1::2]
    cosine, sine = (torch.tensor(values, dtype=torch.float64) for values in (cosines, sines))
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), dim=1).flatten()


class NaiveMoT:
    """`weights`: the parameters of a Decoder by name; the only knowledge of it is how they are named and laid
    out."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        self.config = config
        self.weights = {
            name: value.detach().double().clone().requires_grad_() for name, value in weights.items()
        }

    def _weight(self, layer: str, part: str, modality: int) -> Tensor:
        tower = list(self.config.towers.values())[modality]
        untied = {part, _SHORTHAND.get(part)} & {*self.config.untied}
        return self.weights[f"{layer}.weight.{tower if untied else 'shared'}"]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean() + self.config.norm_eps) * weight

    def _rope(self, x: Tensor, position: int) -> Tensor:
        angles = [position * self.config.rope_theta ** (-i / len(x)) for i in range(0, len(x), 2)]
        return turned(x, [cos(angle) for angle in angles], [sin(angle) for angle in angles])

    def _project(self, x: Tensor, layer: str, modality: int, position: int) -> tuple[list, list, list]:
        """Queries per head, keys and values per kv head, of one token."""
        c = self.config
        rows = (self._weight(f"{layer}.qkv", "qkv", modality) @ x).split(c.head_dim)
        queries, keys = rows[: c.num_heads], rows[c.num_heads : -c.kv_heads]
        if c.qk_norm:
            for_queries, for_keys = self._weight(f"{layer}.qk", "qk_norm", modality).chunk(2)
            queries = [self._norm(q, for_queries) for q in queries]
            keys = [self._norm(k, for_keys) for k in keys]
        return (
            [self._rope(q, position) for q in queries],
            [self._rope(k, position) for k in keys],
            list(rows[-c.kv_heads :]),
        )

    def _sees(self, i: int, j: int, modality: list[int]) -> bool:
        """Whether token i sees token j of its document."""
        return j <= i

    def _rows(self, ids: list[int], modality: list[int]) -> list[Tensor]:
        """What enters the first block."""
        return [self._weight("embedding", "embedding", m)[i] for i, m in zip(ids, modality, strict=True)]

    def _attention(
        self, xs: list[Tensor], layer: str, modality: list[int], position: list[int], document: list[int]
    ) -> list[Tensor]:
        c = self.config
        projected = [self._project(x, layer, m, p) for x, m, p in zip(xs, modality, position, strict=True)]
        outputs = []
        for i in range(len(xs)):
            seen = [j for j in range(len(xs)) if document[j] == document[i] and self._sees(i, j, modality)]
            heads = []
            for head in range(c.num_heads):
                group = head // (c.num_heads // c.kv_heads)
                q = projected[i][0][head]
                shares = (torch.stack([projected[j][1][group] for j in seen]) @ q / sqrt(c.head_dim)).exp()
                values = torch.stack([projected[j][2][group] for j in seen])
                heads.append((shares / shares.sum()) @ values)
            outputs.append(self._weight(f"{layer}.out", "attention_out", modality[i]) @ torch.cat(heads))
        return outputs

    def _feed_forward(self, x: Tensor, layer: str, modality: int) -> Tensor:
        gate, up = (self._weight(f"{layer}.gate_up", "feed_forward", modality) @ x).chunk(2)
        return self._weight(f"{layer}.down", "feed_forward", modality) @ (gate / (1 + (-gate).exp()) * up)

    def _feed_forwards(
        self, xs: list[Tensor], layer: str, modality: list[int], document: list[int]
    ) -> list[Tensor]:
        return [self._feed_forward(x, layer, m) for x, m in zip(xs, modality, strict=True)]

    def hidden(
        self, xs: list[Tensor], modality: list[int], position: list[int], document: list[int]
    ) -> list[Tensor]:
        """After the final norm, of one sequence that enters the first block as `xs`."""

        def norm(x: Tensor, m: int, which: str) -> Tensor:
            part = "final_norm" if which == "final" else "block_norm"
            return self._norm(x, self._weight(f"{which}_norm", part, m))

        for index in range(self.config.num_layers):
            name = f"blocks.{index}"
            attention, feed_forward = f"{name}.attention", f"{name}.feed_forward"

            if self.config.norm_placement == "post":
                seen = self._attention(xs, attention, modality, position, document)
                xs = [x + norm(a, m, attention) for x, a, m in zip(xs, seen, modality, strict=True)]
                made = self._feed_forwards(xs, feed_forward, modality, document)
                xs = [x + norm(f, m, feed_forward) for x, f, m in zip(xs, made, modality, strict=True)]
            else:
                normed = [norm(x, m, attention) for x, m in zip(xs, modality, strict=True)]
                seen = self._attention(normed, attention, modality, position, document)
                xs = [x + a for x, a in zip(xs, seen, strict=True)]
                normed = [norm(x, m, feed_forward) for x, m in zip(xs, modality, strict=True)]
                made = self._feed_forwards(normed, feed_forward, modality, document)
                xs = [x + f for x, f in zip(xs, made, strict=True)]
        return [norm(x, m, "final") for x, m in zip(xs, modality, strict=True)]

    def sequence_logits(
        self, ids: list[int], modality: list[int], position: list[int], document: list[int]
    ) -> Tensor:
        """[tokens, vocab] of one sequence."""
        hidden = self.hidden(self._rows(ids, modality), modality, position, document)
        return self._logits(hidden, modality)

    def _logits(self, hidden: list[Tensor], modality: list[int]) -> Tensor:
        head = "embedding" if self.config.tied_embeddings else "head"
        return torch.stack([self._weight(head, "head", m) @ x for x, m in zip(hidden, modality, strict=True)])

    def objective(
        self, batch: Batch, modality_weights: Sequence[float] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(summed loss with z-loss, logits [sequences, context, vocab]) of a batch. `modality_weights`:
        factor on the loss of each modality's targets."""
        total = torch.zeros((), dtype=torch.float64)
        rows = []
        for b in range(batch.num_sequences):
            logits = self.sequence_logits(
                *(
                    values[b].tolist()
                    for values in (batch.input_ids, batch.input_modality, batch.positions, batch.document_ids)
                )
            )
            rows.append(logits)
            for i in range(batch.sequence_tokens):
                log_z = logits[i].exp().sum().log()
                loss = log_z - logits[i, int(batch.target_ids[b, i])] + self.config.z_loss * log_z**2
                factor = 1.0 if modality_weights is None else modality_weights[batch.target_modality[b, i]]
                total = total + factor * float(batch.loss_weights[b, i]) * loss
        return total, torch.stack(rows)
