"""One micro-batch as the host makes it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens. A document of n ids fills n - 1 slots: inputs ids[:-1], targets ids[1:].

    So a target never crosses documents and every slot that is not padding is predicted.
    """

    input_ids: np.ndarray
    """int32 [B, S]; padding holds <pad>."""
    target_ids: np.ndarray
    """int32 [B, S]; padding holds <pad>."""
    loss_weights: np.ndarray
    """float32 [B, S]; 0 at padding (and where an evaluation asks for no prediction)."""
    positions: np.ndarray
    """int32 [B, S]; 0, 1, 2, ... from the start of each document."""
    document_ids: np.ndarray
    """int32 [B, S]; 0, 1, 2, ... within a sequence, -1 at padding. Non-padding is a prefix of the sequence."""
    input_modality: np.ndarray
    """uint8 [B, S]; index into the vocabulary's modalities."""
    target_modality: np.ndarray
    """uint8 [B, S]."""
    samples: tuple[tuple[str, ...], ...]
    """Per sequence, "shard/key" of each document in it: provenance for error messages."""

    @property
    def num_sequences(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequence_tokens(self) -> int:
        return self.input_ids.shape[1]
