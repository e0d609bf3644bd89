"""Images as vectors, made by denoising on the cache of what comes before them.

A step of denoising is one pass over the opening delimiter and the vectors of an image, whose keys are taken
back. The last pass reads the finished vectors at time 0, as in a prompt, and keeps its keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import VectorFormat, Vocabulary
from pretrain.generation.decoding import pass_inputs, read_tokens
from pretrain.generation.denoise import SAMPLERS, STEPS, Denoising, denoise, denoising
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.sampling import Sampling
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs
from pretrain.models.noising import DIFFUSION_STEPS
from pretrain.models.routing_state import RoutingState
from pretrain.models.vectors import VectorAdapters


def denoising_of(config: ModelConfig, vocabulary: Vocabulary, sampling: Sampling) -> dict[str, Denoising]:
    """Modality of vectors that the model learned -> how its images are made. Raises ConfigError where that
    does not go with what the model learned."""
    steps, sampler = sampling.image_steps or STEPS, sampling.sampler
    asked = {"--image-steps": sampling.image_steps, "--sampler": sampler}
    if not config.learned_vectors and any(asked.values()):
        flag, value = next((flag, value) for flag, value in asked.items() if value is not None)
        raise ConfigError(
            f"{flag} {value}: is for images that are vectors, and this model learned none; leave it out"
        )
    found: dict[str, Denoising] = {}
    for modality in config.learned_vectors:
        own = config.vectors[modality]
        assert own.objective != "none"
        legal = SAMPLERS[own.objective]
        if sampler is not None and sampler not in legal:
            raise ConfigError(
                f"--sampler {sampler}: the model learned {modality} by {own.objective}, which goes with "
                f"{' or '.join(legal)}; name one of these, or leave it out"
            )
        if own.objective == "diffusion" and steps > DIFFUSION_STEPS:
            raise ConfigError(
                f"--image-steps {steps}: the model learned {DIFFUSION_STEPS} steps of diffusion; ask for at "
                "most as many"
            )
        found[modality] = denoising(
            own.objective, own.predicted, steps=steps, sampler=sampler, shift=own.shift,
            bounds=_bounds(vocabulary.vectors[modality]),
        )  # fmt: skip
    return found


def _bounds(form: VectorFormat) -> tuple[float, float] | None:
    """The range of normalised values, of pixels."""
    if form.dtype != "uint8":
        return None
    low, high = form.normalised(np.array([0, 255], np.uint8)).tolist()
    return low, high


@torch.no_grad()
def write_images(
    decoder: Decoder,
    cache: KeyCache,
    sequences: Sequence[int],
    modality: str,
    num_vectors: int,
    how: Denoising,
    generators: Sequence[np.random.Generator],
    vocabulary: Vocabulary,
    routing_state: RoutingState,
) -> list[np.ndarray]:
    """Write the opening delimiter and an image of `num_vectors` vectors behind each of the sequences; returns
    the vectors, as they are stored. The cache is extended in place.

    Noise of sequences[k] is drawn from generators[k].
    """
    form = vocabulary.vectors[modality]
    size = (num_vectors, form.features)
    opening, _ = vocabulary.delimiters(modality)
    ids = np.array([opening, *[vocabulary.first_code(modality)] * num_vectors])

    def fresh() -> Float[np.ndarray, "images vectors features"]:
        return np.stack([generator.standard_normal(size) for generator in generators])

    blank = [Document(ids, {modality: np.zeros(size, form.storage)})] * len(sequences)
    starts = cache.lengths[list(sequences)].tolist()
    inputs = pass_inputs(blank, starts, decoder.config, vocabulary, routing_state)
    predict = _prediction(decoder, cache, sequences, modality, inputs)
    stored = form.stored(denoise(how, predict, fresh(), fresh))
    texts = [Document(ids, {modality: of_image}) for of_image in stored]
    read_tokens(decoder, cache, sequences, texts, vocabulary, routing_state)
    return list(stored)


def _prediction(
    decoder: Decoder, cache: KeyCache, sequences: Sequence[int], modality: str, inputs: ModelInputs
) -> Callable[[Float[np.ndarray, "images vectors features"], float], np.ndarray]:
    """The function (noised vectors, time) -> what the decoder predicts of them, in float64. It leaves the
    cache as it is. `inputs`: of the pass, with any vectors."""
    weight = next(decoder.parameters())
    on_device, adapters = inputs.to(weight.device), decoder.vectors[modality]
    counts = [len(inputs.positions) // len(sequences)] * len(sequences)
    assert isinstance(adapters, VectorAdapters)

    def predict(vectors: np.ndarray, time: float) -> np.ndarray:
        past = cache.begin_pass(sequences, counts, inputs.mask.spans)
        values = torch.from_numpy(vectors).to(weight).flatten(0, 1)
        own = on_device.vectors[modality]
        noised = replace(own, values=values, times=torch.full_like(own.times, time))
        hidden, _ = decoder.hidden(
            replace(
                on_device,
                mask=replace(on_device.mask, past=past),
                vectors={**on_device.vectors, modality: noised},
            )
        )
        cache.take_back(past)
        return adapters.predict(hidden, noised).view(vectors.shape).double().cpu().numpy()

    return predict
