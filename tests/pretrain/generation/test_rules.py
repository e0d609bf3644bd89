"""A model reads a prompt under top_k and writes by thresholds, as a reference of loops in fp64 does."""

from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.files.toml_config import ConfigError
from pretrain.generation.rules import DecodeRule, decoding_rules
from pretrain.models.routing_state import RoutingState
from tests.numerics.naive_depth import SPECIAL_IDS, NaiveDepth
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.generation.test_decoding import PROMPTS, routing_of, texts, token_by_token
from tests.pretrain.models.random_batch import DENSE, MOT, depth_tables, tiny_config
from tests.pretrain.tiny_data import VOCABULARY

DEPTH = {"schedule": "constant", "mean_ratio": 0.6, "rule": "top_k"}
MODELS: dict[str, tuple[dict[str, str], dict[str, Any], DecodeRule]] = {
    "selected": (MOT, depth_tables(["text", "image"], keys="selected", **DEPTH), "threshold"),
    "selected_then_all_run": (DENSE, depth_tables(["text", "image"], keys="selected", **DEPTH), "all"),
    "all_keys_experts": (
        MOT,
        {**depth_tables(["text", "image"], **DEPTH), "experts": {"text": {"num_experts": 2}}},
        "threshold",
    ),
}


class NaivePromptThenWritten(NaiveDepth):
    """Of one document: its first `prompt_tokens` compete with each other alone, later ones with none."""

    prompt_tokens = 0

    def _choose(
        self, index: int, name: str, ratio: float, scores: dict[int, Tensor], ids: list[int],
        modality: list[int], document: list[int],
    ) -> dict[int, bool]:  # fmt: skip
        number = list(self.config.towers).index(name)
        mine = [i for i in range(len(ids)) if modality[i] == number]
        free = [i for i in mine if ids[i] >= SPECIAL_IDS]
        prompt = sorted((i for i in free if i < self.prompt_tokens), key=lambda i: (-scores[i].item(), i))
        least = self.thresholds.get(f"blocks.{index}.depth.{name}", -float("inf"))
        run = {i: ids[i] < SPECIAL_IDS for i in mine}
        run |= {i: scores[i].item() >= least for i in free if i >= self.prompt_tokens}
        return run | {i: True for i in prompt[: int(len(prompt) * ratio + 1e-9)]}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_choices_equal_a_naive_reference(name: str) -> None:
    towers, changes, decode_rule = MODELS[name]
    model = tiny_config(towers, context_tokens=64, vocab_tokens=VOCABULARY.size, **changes)
    decoder = perturbed(model).double().eval()
    rules = decoding_rules(model, routing_of(model), "top_k", decode_rule)
    assert rules.told is not None and "top_k" in rules.told
    logits, ran, cache = token_by_token(decoder, rules.decode, rules.prefill)
    for text, (ids, prompt_tokens) in enumerate(zip(texts(), PROMPTS, strict=True)):
        naive = NaivePromptThenWritten(
            model, dict(decoder.named_parameters()), thresholds=rules.decode.thresholds, causal=True
        )
        naive.prompt_tokens = prompt_tokens
        count = len(ids)
        modality = VOCABULARY.modality_of(ids).tolist()
        expected = naive.sequence_logits(ids.tolist(), modality, list(range(count)), [0] * count)
        for layer, of_layer in enumerate(naive.ran):
            assert [of_layer[i] for i in range(count)] == ran[text][:, layer].tolist()
        # 2.9e-15 measured, relative to the largest logit.
        for tokens, row in logits[text].items():
            torch.testing.assert_close(
                row, expected[tokens - 1], rtol=0, atol=1e-12 * float(expected.abs().max())
            )
    written = torch.cat([torch.from_numpy(r[p:]) for r, p in zip(ran, PROMPTS, strict=True)])
    assert bool(written.all()) == (decode_rule == "all")
    if model.depth_block.keys == "selected":
        kept = sum(int(of_text.sum()) for of_text in ran)
        assert cache.held_bytes == kept * 2 * model.kv_heads * model.head_dim * 8


def test_the_prompt_rule_differs_from_thresholds() -> None:
    """Else the test above could not see which of them acts."""
    towers, changes, _ = MODELS["selected"]
    model = tiny_config(towers, context_tokens=64, vocab_tokens=VOCABULARY.size, **changes)
    decoder, state = perturbed(model).double().eval(), routing_of(model)
    rules = decoding_rules(model, state, "top_k")
    _, under_top_k, _ = token_by_token(decoder, rules.decode, rules.prefill)
    _, by_thresholds, _ = token_by_token(decoder, state)
    assert any((a != b).any() for a, b in zip(under_top_k, by_thresholds, strict=True))


def test_rules_that_a_model_lacks_are_refused() -> None:
    state = RoutingState(causal=True)
    dense, top_k = tiny_config(MOT), tiny_config(MOT, **MODELS["selected"][1])
    thresholds = tiny_config(MOT, **depth_tables(["image"], **DEPTH | {"rule": "threshold"}))
    assert decoding_rules(dense, state).prefill == state
    with pytest.raises(ConfigError, match=r"--prefill-rule top_k: no model\.depth .*\(no token skips\)"):
        decoding_rules(dense, state, "top_k")
    with pytest.raises(ConfigError, match=r"\(image by threshold\)"):
        decoding_rules(thresholds, state, "top_k")
    with pytest.raises(ConfigError, match="--decode-rule all: goes with --prefill-rule top_k alone"):
        decoding_rules(top_k, state, decode_rule="all")
