"""Keys of modalities that are vectors: what is learned of them, and how they enter and leave the decoder.
Imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.models.experts_config import Size
from pretrain.models.noising import Prediction, TimeDistribution

TIME_FEATURES = 256
"""Sines and cosines of a time (as many as in DiT, arXiv 2212.09748), and the width of the layer behind."""
MAX_PERIOD = 10_000.0
"""Of these waves the slowest one's period, in steps of which a time has 1000."""


class VectorsConfig(BaseModel):
    """One modality of vectors. All vectors between an opening and a closing delimiter are one image, with one
    time and one share in the loss."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: Size
    """Numbers of a vector, as in the data."""
    objective: Literal["diffusion", "flow", "none"] = "diffusion"
    """What is learned. diffusion: the noise of DDPM with 1,000 steps of the cosine schedule (Transfusion,
    arXiv 2408.11039). flow: the velocity on straight lines from vectors to noise (BAGEL, arXiv 2505.14683).
    none: nothing; vectors are context alone and have no noise."""
    prediction: Literal["epsilon", "v"] | None = None
    """What diffusion predicts: the noise (None: this), or v (arXiv 2202.00512)."""
    times: TimeDistribution = "uniform"
    """How an image's time, from 0 (clean) to 1 (noise), is drawn in training and evaluation."""
    shift: float = Field(1.0, gt=0, allow_inf_nan=False)
    """More than 1 draws more of the noisy times: t becomes s t / (1 + (s - 1) t)."""
    condition_max_time: float | None = Field(None, gt=0, le=1)
    """The times of an image that tokens of other modalities follow in its document are scaled to end here, so
    that a caption's image is seen well (Transfusion: 0.5). Special tokens do not count. None: they are as all
    others."""
    bidirectional: bool = True
    """Whether the vectors of an image see each other both ways; False: attention is causal there too."""
    adapter: Literal["linear"] = "linear"
    """How vectors become rows of the stream, and rows predictions: by one linear layer each way."""

    @model_validator(mode="after")
    def _check(self) -> "VectorsConfig":
        if self.prediction is not None and self.objective != "diffusion":
            raise ValueError(
                f'prediction = "{self.prediction}" is of objective = "diffusion", but objective = '
                f'"{self.objective}"; leave prediction out'
            )
        if self.objective == "none":
            # Not model_fields_set: the config that a run keeps has all keys.
            keys = ("condition_max_time", "shift", "times")
            fields = type(self).model_fields
            if changed := [key for key in keys if getattr(self, key) != fields[key].default]:
                raise ValueError(
                    f'objective = "none" draws no times, so {", ".join(changed)} would do nothing; '
                    "leave it out"
                )
        return self

    @property
    def predicted(self) -> Prediction:
        """What the decoder's output is."""
        return "velocity" if self.objective == "flow" else self.prediction or "epsilon"

    @property
    def learns(self) -> bool:
        """Whether images have a loss."""
        return self.objective != "none"
