"""Transfusion token by token, in fp64: images as vectors with noise, in a decoder that shows an image to
itself. It shares no code with the model but the numbers that are drawn."""

from collections.abc import Callable, Mapping
from math import cos, exp, log, pi, sin, sqrt

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shards.vocabulary import VectorFormat
from data_pipeline.stream.batch import Batch
from pretrain.models.config import ModelConfig
from tests.numerics.naive_mot import NaiveMoT


class NaiveVectors(NaiveMoT):
    """`modality`: the one of vectors, by its name."""

    def __init__(
        self, config: ModelConfig, weights: Mapping[str, Tensor], modality: str, form: VectorFormat
    ) -> None:
        super().__init__(config, weights)
        self.name, self.form = modality, form
        self.number = list(config.towers).index(modality)
        self.own = config.vectors[modality]

    def _sees(self, i: int, j: int, modality: list[int]) -> bool:
        first, last = min(i, j), max(i, j)
        of_one_image = all(m == self.number for m in modality[first : last + 1])
        return j <= i or (self.own.bidirectional and of_one_image)

    def _affine(self, name: str, x: Tensor) -> Tensor:
        shard = self.config.towers[self.name] if "vectors" in self.config.untied else "shared"
        at = f"vectors.{self.name}.{name}"
        return self.weights[f"{at}.weight.{shard}"] @ x + self.weights[f"{at}.bias.{shard}"]

    def _time(self, time: float) -> Tensor:
        angles = [1000 * float(np.float32(time)) * exp(-log(10_000) * k / 128) for k in range(128)]
        waves = torch.tensor([*map(cos, angles), *map(sin, angles)], dtype=torch.float64)
        hidden = self._affine("time_hidden", waves)
        return self._affine("time", hidden / (1 + (-hidden).exp()))

    def _noised(self, clean: np.ndarray, eps: np.ndarray, time: float) -> tuple[np.ndarray, np.ndarray]:
        """(input, target) of an image, as they are rounded to float32."""
        clean, eps = clean.astype(np.float64), eps.astype(np.float64)
        if self.own.objective == "flow":
            made = (1 - time) * clean + time * eps, eps - clean
        else:
            # The share of the signal at every step, from the squared cosine, with betas of at most 0.999.
            edges = [cos((k / 1000 + 0.008) / 1.008 * pi / 2) ** 2 for k in range(1001)]
            share = 1.0
            for k in range(int(1000 * time) + 1):
                share *= 1 - min(1 - edges[k + 1] / edges[k], 0.999)
            signal, noise = sqrt(share), sqrt(1 - share)
            target = signal * eps - noise * clean if self.own.prediction == "v" else eps
            made = signal * clean + noise * eps, target
        return made[0].astype(np.float32), made[1].astype(np.float32)

    def objective_of(
        self, batch: Batch, draw: Callable[..., tuple[float, np.ndarray]], number: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """(next-token losses + scale * the sum of images' mean squared errors, logits). `draw`: what
        `training_draw` is of a step. `number`: of the first sequence in the global batch."""
        total = torch.zeros((), dtype=torch.float64)
        rows = []
        stored = batch.vectors[self.name]
        for b in range(batch.num_sequences):
            ids, modality, position, document = (
                values[b].tolist()
                for values in (batch.input_ids, batch.input_modality, batch.positions, batch.document_ids)
            )
            vectors = stored.values[stored.first[b] : stored.first[b + 1]].astype(np.float32)
            vectors = (vectors - np.float32(self.form.mean)) / np.float32(self.form.std)
            xs, images, i = self._rows(ids, modality), [], 0
            while i < len(ids):
                if modality[i] != self.number:
                    i += 1
                    continue
                first = i
                while i < len(ids) and modality[i] == self.number:
                    i += 1
                clean, vectors = vectors[: i - first], vectors[i - first :]
                values, target, time = clean, None, 0.0
                if self.own.objective != "none" and batch.loss_weights[b, first - 1]:
                    quantile, eps = draw(number + b, first, clean.shape)
                    time = quantile * self._most(batch, b, i)
                    values, target = self._noised(clean, eps, time)
                images.append((first, target))
                for k, vector in enumerate(values):
                    entered = self._affine("enter", torch.from_numpy(vector).double())
                    if self.own.objective != "none":
                        entered = entered + self._time(time)
                    xs[first + k] = xs[first + k] + entered
            hidden = self.hidden(xs, modality, position, document)
            logits = self._logits(hidden, modality)
            rows.append(logits)
            for i in range(batch.sequence_tokens):
                if self.number not in (modality[i], batch.target_modality[b, i]):
                    loss = logits[i].exp().sum().log() - logits[i, int(batch.target_ids[b, i])]
                    total = total + float(batch.loss_weights[b, i]) * loss
            for first, target in images:
                if target is not None:
                    errors = [
                        (self._affine("leave", hidden[first + k]) - torch.from_numpy(of)).square().mean()
                        for k, of in enumerate(target)
                    ]
                    total = total + scale * sum(errors) / len(errors)
        return total, torch.stack(rows)

    def _most(self, batch: Batch, b: int, end: int) -> float:
        """The end of the times of an image that ends before slot `end`."""
        later = [
            i
            for i in range(end, batch.sequence_tokens)
            if batch.document_ids[b, i] == batch.document_ids[b, end - 1]
            and not batch.input_special[b, i]
            and batch.input_modality[b, i] != self.number
        ]
        return self.own.condition_max_time if later and self.own.condition_max_time else 1.0
