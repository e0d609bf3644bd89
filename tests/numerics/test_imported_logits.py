"""Imported Llama, Qwen2 and Qwen3 models compute what transformers computes; exported ones too."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, modeling_rope_utils

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.weights.folder import (
    MODEL,
    Dtype,
    LazyTensor,
    WeightSource,
    about_model,
    open_weights,
    write_folder,
)
from pretrain.weights.hugging_face import CONFIG, open_hugging_face, to_hugging_face
from pretrain.weights.warm_start import adapt_weights
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close, cast
from tests.pretrain.models.random_batch import IMAGE_SPEECH_SHARED, MOT, TWO_TOWERS, random_batch
from tests.pretrain.tiny_hugging_face import models, tiny_hugging_face


class _WideTorch:
    """What the name `torch` means to a module of transformers in these tests. Its models compute norms and
    angles in fp32 whatever their dtype; here fp64 is what they ask for."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def widened(reference: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model of transformers in fp64 throughout."""
    monkeypatch.setattr(sys.modules[type(reference).__module__], "torch", _WideTorch())
    wide = reference.double()
    rotary = wide.model.rotary_emb
    monkeypatch.setattr(modeling_rope_utils, "torch", _WideTorch())
    scaled = modeling_rope_utils.ROPE_INIT_FUNCTIONS.get(rotary.rope_type)
    rotary.inv_freq, _ = (scaled or rotary.compute_default_rope_parameters)(wide.config)
    assert rotary.inv_freq.dtype == torch.float64
    return wide


def decoder_of(source: WeightSource, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder that holds exactly these weights."""
    decoder = Decoder(source.model).to(dtype)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(source.tensors[name].read())
    return decoder


def whole_documents(model: ModelConfig, **how: int):
    """A batch whose sequences are one document each, as transformers sees them."""
    return random_batch(
        model, sequences=3, document_tokens=(model.context_tokens,) * 2, padding_tokens=0, **how
    )


def logits(source: WeightSource, batch, dtype: torch.dtype) -> torch.Tensor:
    """In sequence order: [sequences, context, vocabulary]."""
    inputs = build_inputs(batch, source.model)
    with torch.no_grad():
        flat = decoder_of(source, dtype)(inputs)[inputs.routing.to_sequence]
    return flat.unflatten(0, batch.input_ids.shape)


def reference_logits(reference, batch) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.from_numpy(batch.input_ids.astype(np.int64))).logits


@pytest.mark.pairwise
@models
@pytest.mark.parametrize("towers", [None, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_imported_logits_are_those_of_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, towers: dict | None, dtype: torch.dtype
) -> None:
    reference = tiny_hugging_face(kind, tmp_path / "hf")
    if dtype == torch.float64:
        reference = widened(reference, monkeypatch)
    source = open_hugging_face(tmp_path / "hf")
    if towers is not None:
        target = source.model.model_copy(update={"towers": towers})
        source = adapt_weights(source, target, seed=1, new_towers={}, vocabulary=None)
    batch = whole_documents(source.model)
    assert len(np.unique(batch.input_modality)) == (1 if towers is None else 3)
    assert_close(logits(source, batch, dtype), reference_logits(reference, batch), "logits")


@pytest.mark.parametrize("mistake", [{"rope_theta": 499.0}, {"norm_eps": 2e-6}], ids=str)
def test_a_number_that_is_read_wrongly_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: dict[str, float]
) -> None:
    reference = widened(tiny_hugging_face("qwen3", tmp_path / "hf"), monkeypatch)
    source = open_hugging_face(tmp_path / "hf")
    batch = whole_documents(source.model)
    expected = reference_logits(reference, batch)
    wrong = replace(source, model=source.model.model_copy(update=mistake))
    off = float((logits(wrong, batch, torch.float64) - expected).abs().max())
    assert off > 100 * TOLERANCE[torch.float64] * float(expected.abs().max())


@models
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_exported_again_it_is_the_same_model(tmp_path: Path, kind: str, dtype: Dtype) -> None:
    """hf -> ours on disk -> hf: every tensor bit for bit (in bf16: rounded once), and transformers agrees."""
    reference = tiny_hugging_face(kind, tmp_path / "hf")
    source = open_hugging_face(tmp_path / "hf")
    write_folder(tmp_path / "ours", source, {MODEL: about_model(source)}, dtype="fp32", file_bytes=3_000)
    theirs, config = to_hugging_face(open_weights(tmp_path / "ours"))
    write_folder(tmp_path / "back", theirs, {CONFIG: config}, dtype=dtype, file_bytes=5_000)
    back, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", dtype=torch.float32, output_loading_info=True
    )
    assert type(back) is type(reference)
    assert not any(report[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = back.state_dict()
    for name, tensor in reference.state_dict().items():
        expected = tensor if dtype == "fp32" else tensor.bfloat16().float()
        assert torch.equal(state[name], expected), name
    if dtype == "fp32":
        batch = whole_documents(source.model)
        assert torch.equal(reference_logits(back.eval(), batch), reference_logits(reference, batch))


@pytest.mark.parametrize(
    ("kind", "wider"), [("llama", 1), ("llama3.1", 1), ("qwen2.5_yarn", 1), ("qwen3", 1), ("qwen3", 2)]
)
def test_a_motley_model_exported_computes_the_same_in_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wider: int
) -> None:
    """From a drawn model, so nothing of it was ever in their order. `wider`: than its mup_base_width."""
    tiny_hugging_face(kind, tmp_path / "hf")
    model = open_hugging_face(tmp_path / "hf").model
    model = model.model_copy(update={"mup_base_width": model.d_model // wider})
    drawn = Decoder(model, seed=4)
    with torch.no_grad():
        for name, parameter in drawn.named_parameters():
            if "norm" in name or ".qk." in name or ".bias." in name:
                parameter.uniform_(0.5, 1.5)
    tensors = {name: LazyTensor(tuple(p.shape), p.detach) for name, p in drawn.named_parameters()}
    source = WeightSource(tmp_path / "run", model, tensors, "run")
    theirs, config = to_hugging_face(source)
    write_folder(tmp_path / "out", theirs, {CONFIG: config}, dtype="fp32", file_bytes=10**9)
    batch = whole_documents(model)
    reference = widened(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), monkeypatch)
    assert_close(logits(source, batch, torch.float64), reference_logits(reference, batch), "logits")


@pytest.mark.pairwise
@pytest.mark.parametrize("towers", [MOT, IMAGE_SPEECH_SHARED, TWO_TOWERS], ids=["mot", "shared", "two"])
@pytest.mark.parametrize("untied", [("attention", "feed_forward", "norm"), ("feed_forward",)])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_mot_started_from_dense_has_its_loss(
    tmp_path: Path, towers: dict, untied: tuple, dtype: torch.dtype
) -> None:
    tiny_hugging_face("qwen3", tmp_path / "hf")
    text_only = open_hugging_face(tmp_path / "hf")
    dense = adapt_weights(
        text_only,
        text_only.model.model_copy(update={"towers": dict.fromkeys(towers, "all")}),
        seed=1,
        new_towers={},
        vocabulary=None,
    )
    target = dense.model.model_copy(update={"towers": towers, "untied": untied})
    mot = adapt_weights(dense, target, seed=1, new_towers={}, vocabulary=None)
    batch = random_batch(dense.model, sequences=3)
    losses = []
    for source in (dense, mot):
        decoder, inputs = cast(decoder_of(source), build_inputs(batch, source.model), dtype)
        losses.append(Pretraining(decoder)(inputs)[0])
    assert_close(losses[1], losses[0], "objective")
