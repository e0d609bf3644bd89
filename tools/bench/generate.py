"""`motley bench generate`: what a prompt, a written token and the cache cost dense, MoT and p-MoD models.

All models read the same prompts, of which the first seven eighths are image tokens and the rest text, and
write the same tokens behind them. p-MoD's image tokens skip layers by its schedule (mean ratio 0.5375), by
thresholds that reach the ratios on these prompts. Models take turns, as in `motley bench model`, whose clock
and ratios these are; the ledger's FLOPs stand beside the times. Weights are random: what is timed depends on
sizes, and on how many tokens run.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Int

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import SPECIAL_TOKENS, TEXT, Vocabulary
from pretrain.generation.decoding import pass_inputs, read_tokens
from pretrain.generation.key_cache import KeyCache
from pretrain.models.accounting import visible_pairs
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.decoding_accounting import cache_bytes, decoded_token_flops, prefill_flops
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState
from tools.bench.model import BASELINE, Case, Row, dtype_on, measure, prepare
from tools.bench.sparse import settled

CPU_CASES = (Case(8, 256, 8, 1, 1024, 2816),)
GPU_CASES = (Case(16, 2048, 16, 16, 2048, 65536), Case(16, 2048, 16, 1, 2048, 65536))
"""`context_tokens` is the length of a prompt, `sequences` the number of prompts side by side."""
WRITTEN = 16
"""Tokens that are written behind each prompt in a timed pass."""
IMAGE = "image"
_PMOD = {"schedule": "cosine", "mean_ratio": 0.5375, "rule": "threshold", "dense_frac": 0.0, "ramp_frac": 0.0}


@dataclass(frozen=True)
class Quantity:
    """One thing that is measured of all models."""

    what: str
    rows: Sequence[Row]
    per_pass: int
    """Prompts or tokens of one pass."""
    flops: Mapping[str, int]
    """Model -> FLOPs by the ledger, in any unit that is the same for all."""


def configs(case: Case) -> dict[str, ModelConfig]:
    """The models by name; the first is the baseline."""
    names = (TEXT, IMAGE, "speech")
    values = {
        "num_layers": case.num_layers,
        "d_model": case.d_model,
        "num_heads": case.num_heads,
        "context_tokens": case.context_tokens + WRITTEN,
        "vocab_tokens": case.vocab_tokens,
        "norm_placement": "pre",
        "towers": dict.fromkeys(names, "all"),
    }

    def pmod(keys: str) -> ModelConfig:
        tables = {"depth": {IMAGE: _PMOD}, "depth_block": {"keys": keys}}
        return ModelConfig.model_validate(values | tables)

    return {
        BASELINE: ModelConfig.model_validate(values),
        "mot, 3 towers": ModelConfig.model_validate(values | {"towers": {name: name for name in names}}),
        "p-mod, all keys": pmod("all"),
        "p-mod, selected keys": pmod("selected"),
    }


def vocabulary_of(case: Case) -> Vocabulary:
    """A quarter of the ids for speech and for images, the rest for text."""
    quarter = case.vocab_tokens // 4
    return Vocabulary(sizes={TEXT: case.vocab_tokens - 2 * quarter, IMAGE: quarter, "speech": quarter})


def prompts_of(case: Case) -> list[Document]:
    """Random ids of the prompts: images, then text, no special tokens."""
    rng, vocabulary = np.random.default_rng(0), vocabulary_of(case)
    images = case.context_tokens * 7 // 8
    return [
        Document(
            np.concatenate(
                [
                    _drawn(rng, vocabulary, IMAGE, images),
                    _drawn(rng, vocabulary, TEXT, case.context_tokens - images),
                ]
            )
        )
        for _ in range(case.sequences)
    ]


def _drawn(
    rng: np.random.Generator, vocabulary: Vocabulary, modality: str, count: int
) -> Int[np.ndarray, " tokens"]:
    start = vocabulary.start(modality)
    return rng.integers(max(start, len(SPECIAL_TOKENS)), start + vocabulary.sizes[modality], count)


class Speaker:
    """A model with the cache behind its prompts."""

    def __init__(self, case: Case, config: ModelConfig, device: torch.device) -> None:
        self.case, self.vocabulary, self.prompts = case, vocabulary_of(case), prompts_of(case)
        self.decoder = Decoder(config).to(device, dtype_on(device)).eval()
        self.state = self._settled(config, device)
        self.cache = self.prefill()

    @torch.no_grad()
    def _settled(self, config: ModelConfig, device: torch.device) -> RoutingState:
        starts = [0] * len(self.prompts)
        inputs = pass_inputs(self.prompts, starts, config, self.vocabulary, RoutingState()).to(device)

        def run(_: torch.nn.Module, of: ModelInputs) -> RouterReport:
            return self.decoder.hidden(of)[1]

        return settled(self.decoder, inputs, run, config)[0].routing_state

    def prefill(self) -> KeyCache:
        """Read the prompts in one pass; returns the cache behind them."""
        cache = KeyCache.empty(len(self.prompts))
        read_tokens(self.decoder, cache, range(len(self.prompts)), self.prompts, self.vocabulary, self.state)
        return cache

    def write(self, ids: Int[np.ndarray, "tokens prompts"]) -> None:
        """Let each prompt be followed by a column of `ids`, token by token; the cache stays as it is."""
        layers = {name: replace(of, lengths=of.lengths.copy()) for name, of in self.cache.layers.items()}
        cache = KeyCache(self.cache.lengths.copy(), layers)
        for row in ids:
            one_each = [Document(np.array([token])) for token in row]
            read_tokens(self.decoder, cache, range(len(row)), one_each, self.vocabulary, self.state)


def measured(case: Case, device: torch.device, rounds: int) -> tuple[list[Quantity], dict[str, KeyCache]]:
    """(times of prompts and of written tokens, model -> cache behind the prompts)."""
    speakers = {name: Speaker(case, config, device) for name, config in configs(case).items()}
    quantities = [_prefill(case, speakers, device, rounds)]
    quantities += [_written(case, speakers, modality, device, rounds) for modality in (TEXT, IMAGE)]
    return quantities, {name: speaker.cache for name, speaker in speakers.items()}


def _prefill(case: Case, speakers: Mapping[str, Speaker], device: torch.device, rounds: int) -> Quantity:
    passes: dict[str, Callable[[], None]] = {n: _dropping(s.prefill) for n, s in speakers.items()}
    tokens, pairs = prompt_tokens(case), visible_pairs([case.context_tokens])
    flops = {n: prefill_flops(s.decoder.config, tokens, pairs) for n, s in speakers.items()}
    return Quantity("a prompt", measure("prompts", passes, device, rounds), case.sequences, flops)


def _written(
    case: Case, speakers: Mapping[str, Speaker], modality: str, device: torch.device, rounds: int
) -> Quantity:
    ids = _drawn(np.random.default_rng(1), vocabulary_of(case), modality, WRITTEN * case.sequences)
    ids = ids.reshape(WRITTEN, case.sequences)

    def writing(speaker: Speaker) -> Callable[[], None]:
        return lambda: speaker.write(ids)

    passes = {name: writing(speaker) for name, speaker in speakers.items()}
    tokens = prompt_tokens(case)
    flops = {n: decoded_token_flops(s.decoder.config, modality, tokens) for n, s in speakers.items()}
    rows = measure(f"{modality} tokens", passes, device, rounds)
    return Quantity(f"{modality} tokens written", rows, WRITTEN * case.sequences, flops)


def prompt_tokens(case: Case) -> dict[str, int]:
    """Modality -> tokens of one prompt."""
    images = case.context_tokens * 7 // 8
    return {TEXT: case.context_tokens - images, IMAGE: images}


def _dropping(run: Callable[[], object]) -> Callable[[], None]:
    def timed() -> None:
        run()

    return timed


def table(quantities: Sequence[Quantity], caches: Mapping[str, KeyCache], case: Case) -> str:
    """The measurements as tables of text."""
    lines = []
    for quantity in quantities:
        head = f"{quantity.what:24}{'ms':>9}  {'per second':>10}  {'time / dense':>12}  {'p10 - p90':>14}"
        lines += [f"  {head}  {'FLOPs / dense':>13}"]
        for row in quantity.rows:
            (low, high), flops = row.ratio_spread, quantity.flops
            ms, per_second = row.median_ms / quantity.per_pass, 1e3 * quantity.per_pass / row.median_ms
            lines.append(
                f"  {row.variant:24}{ms:9.2f}  {per_second:10.2f}  {row.ratio:12.3f}  {low:6.3f} -{high:6.3f}"
                f"  {flops[row.variant] / flops[BASELINE]:13.3f}"
            )
        lines.append("")
    lines.append(f"  {'cache of a prompt':24}{'bytes':>12}  {'/ dense':>8}  {'ledger / dense':>14}")
    ledger = {name: cache_bytes(config, prompt_tokens(case)) for name, config in configs(case).items()}
    for name, cache in caches.items():
        lines.append(
            f"  {name:24}{cache.held_bytes / case.sequences:12,.0f}"
            f"  {cache.held_bytes / caches[BASELINE].held_bytes:8.3f}"
            f"  {ledger[name] / ledger[BASELINE]:14.3f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Run `motley bench generate`; returns the exit code. `options`: as parsed by tools/bench/options.py."""
    if options.layers is not None and options.layers < 2:
        raise ConfigError(f"generate: --layers {options.layers}: p-MoD's schedule needs 2 or more")
    device, cases = prepare("generate", options, CPU_CASES, GPU_CASES, "prompts and tokens behind them")
    for case in cases:
        quantities, caches = measured(case, device, options.rounds)
        print(
            f"{case.label}; prompts of {case.context_tokens} tokens, {prompt_tokens(case)[IMAGE]} of images"
        )
        print(f"{table(quantities, caches, case)}\n", flush=True)
    return 0
