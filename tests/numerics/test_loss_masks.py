"""Context parts: losses and gradients are those of a loop over documents that leaves their ids out."""

from pathlib import Path

import numpy as np
import torch

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.stream import Stream
from pretrain.models import modality_sums
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.numerics.naive_mot import NaiveMoT
from tests.numerics.test_naive_mot import perturbed
from tests.pretrain.models.precision import assert_close, cast
from tests.pretrain.models.random_batch import TWO_TOWERS, tiny_config

VOCABULARY = Vocabulary(sizes={"text": 24, "image": 16})
DOCUMENTS = [
    np.array([1, *text, 3, *image, 4, 2])
    for text, image in (([9, 8], [30]), ([10], [25, 26]), ([7, 7, 12], [39]), ([20], [24, 24, 31]))
]
MASKED = {0: np.array([[1, 3]]), 1: np.array([[2, 6]]), 2: np.array([[1, 2], [4, 6]])}
"""The text of the first, the picture of the second with its delimiters, two stretches of the third."""


def naive_sums(naive: NaiveMoT) -> tuple[torch.Tensor, dict[str, float], dict[str, int]]:
    """(summed loss of the targets, nats per modality, targets per modality) of all documents, one by one."""
    total = torch.zeros((), dtype=torch.float64)
    nats, counts = dict.fromkeys(VOCABULARY.modalities, 0.0), dict.fromkeys(VOCABULARY.modalities, 0)
    for number, ids in enumerate(DOCUMENTS):
        modality = VOCABULARY.modality_of(ids).tolist()
        inputs, positions = ids[:-1].tolist(), list(range(len(ids) - 1))
        logits = naive.sequence_logits(inputs, modality[:-1], positions, [0] * len(inputs))
        for i in range(1, len(ids)):
            if any(start <= i < end for start, end in MASKED.get(number, [])):
                continue
            loss = logits[i - 1].logsumexp(0) - logits[i - 1, int(ids[i])]
            total = total + loss
            name = VOCABULARY.modalities[modality[i]]
            nats[name], counts[name] = nats[name] + float(loss.detach()), counts[name] + 1
    return total, nats, counts


def test_masked_losses_and_gradients_are_those_of_a_loop_over_documents(tmp_path: Path) -> None:
    config = tiny_config(TWO_TOWERS, vocab_tokens=VOCABULARY.size)
    write_token_folder(tmp_path, DOCUMENTS, VOCABULARY, documents_per_shard=3, masked=MASKED)
    stream = Stream(
        [(TokenSource.open(tmp_path), 1.0)],
        seed=1,
        context_tokens=config.context_tokens,
        sequences_per_step=sum(len(ids) - 1 for ids in DOCUMENTS) // config.context_tokens + 1,
    )
    with Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=1, prefetch_steps=0) as loader:
        step = loader.next_step()
    assert step.epochs == (1.0,), "each document once"
    decoder = perturbed(config)
    naive = NaiveMoT(config, dict(decoder.named_parameters()))
    expected, nats, counts = naive_sums(naive)
    expected.backward()
    objective, stats = torch.zeros((), dtype=torch.float64), 0.0
    for batch in step.micro_batches:
        decoder, inputs = cast(decoder, build_inputs(batch, config), torch.float64)
        of_batch, sums, _ = Pretraining(decoder)(inputs)
        objective, stats = objective + of_batch, stats + sums.double()
    objective.backward()
    assert_close(objective, expected, "objective")
    for name, found in modality_sums.unpack(torch.as_tensor(stats).tolist(), VOCABULARY.modalities).items():
        assert found.weight == counts[name]
        assert abs(found.nats - nats[name]) < 1e-5 * nats[name]  # stats are fp32: 1e-7 measured
    for name, parameter in decoder.named_parameters():
        grad = naive.weights[name].grad
        if grad is not None and parameter.grad is not None:
            assert_close(parameter.grad, grad, name)
