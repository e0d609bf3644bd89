"""`motley bench model`: the time of towers, compared with the dense model and with MoT routed as published.

All variants of a case take turns in one process, with a forward and a backward pass at a time, so that other
load of the machine slows all of them. On a CPU the clock is the CPU time of one thread; on a GPU it is events
on the stream. Ratios are formed within a round, and their median is reported.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import SPECIAL_TOKENS
from data_pipeline.stream.batch import Batch
from parallel.host_memory import keep_freed_memory
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.query_key import rotary_table
from pretrain.models.router_report import RouterReport
from tools.bench.published_mot import PublishedDecoder

BASELINE = "dense"

ModelPass = Callable[[torch.nn.Module, ModelInputs], RouterReport]
"""A function that runs a forward and backward pass and leaves no gradient; it returns the routers' report."""


@dataclass(frozen=True)
class Case:
    """The model that is timed: one block (`num_layers` None), or a decoder with embedding, head and loss."""

    num_layers: int | None
    d_model: int
    num_heads: int
    sequences: int
    context_tokens: int
    vocab_tokens: int

    @property
    def label(self) -> str:
        what = (
            "block"
            if self.num_layers is None
            else f"decoder, {self.num_layers} layers, vocabulary {self.vocab_tokens}"
        )
        return f"{what}, d_model {self.d_model}, {self.sequences} x {self.context_tokens} tokens"


CPU_CASES = (
    Case(None, 512, 8, 2, 1024, 512),
    Case(None, 512, 8, 1, 256, 512),
    Case(4, 128, 4, 8, 512, 2816),
)
GPU_CASES = (
    Case(None, 1024, 16, 4, 4096, 512),
    Case(None, 4096, 32, 2, 4096, 512),
    Case(8, 1024, 16, 4, 4096, 65536),
)


@dataclass(frozen=True)
class Row:
    """The time of one variant of a case: milliseconds of a forward and a backward pass."""

    variant: str
    median_ms: float
    spread_ms: tuple[float, float]
    """10th and 90th percentiles."""
    ratio: float
    """Median over rounds of this variant's time over the baseline's of the same round."""
    ratio_spread: tuple[float, float]


def variants(case: Case, device: torch.device) -> dict[str, Callable[[], None]]:
    """By variant, a function for a forward and backward pass. All have the same weights and tokens."""
    passes: dict[str, Callable[[], None]] = {BASELINE: _ours(case, 1, device)}
    for towers in (2, 3):
        passes[f"mot, {towers} towers"] = _ours(case, towers, device)
        passes[f"published, {towers} towers"] = _published(case, towers, device)
    return passes


def measure(
    what: str, passes: Mapping[str, Callable[[], None]], device: torch.device, rounds: int
) -> list[Row]:
    """Time all variants `rounds` times in turns, after one pass to warm up; ratios are to BASELINE.

    `what` is the label of the line of progress.
    """
    clock = _gpu_ms if device.type == "cuda" else _cpu_ms
    for one_pass in passes.values():
        one_pass()
    times: dict[str, list[float]] = {name: [] for name in passes}
    with Progress(what, total=rounds, unit="round") as progress:
        for index in range(rounds):
            names = list(passes)
            for name in names[index % len(names) :] + names[: index % len(names)]:
                times[name].append(clock(passes[name]))
            progress.advance()
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[BASELINE], strict=True)]
        rows.append(
            Row(name, statistics.median(values), _spread(values), statistics.median(ratios), _spread(ratios))
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of text."""
    lines = [f"  {'':22}{'ms':>9}  {'p10 - p90':>17}  {'/ dense':>8}  {'p10 - p90':>13}"]
    for row in rows:
        low, high = row.spread_ms
        ratio_low, ratio_high = row.ratio_spread
        lines.append(
            f"  {row.variant:22}{row.median_ms:9.2f}  {low:8.2f} -{high:7.2f}  {row.ratio:8.3f}"
            f"  {ratio_low:6.3f} -{ratio_high:5.3f}"
        )
    return "\n".join(lines)


def run(options: argparse.Namespace) -> int:
    """Run `motley bench model`; returns the exit code. `options`: as parsed by tools/bench/options.py."""
    device, cases = prepare("model", options, CPU_CASES, GPU_CASES)
    for case in cases:
        rows = measure(case.label, variants(case, device), device, options.rounds)
        print(f"{case.label}\n{table(rows)}\n", flush=True)
    return 0


def prepare(
    verb: str,
    options: argparse.Namespace,
    cpu_cases: tuple[Case, ...],
    gpu_cases: tuple[Case, ...],
    what: str = "forward + backward",
) -> tuple[torch.device, tuple[Case, ...]]:
    """(device, cases) of `motley bench <verb>`. It prepares the process for its clock, and prints which it
    is.

    `what`: a pass, in words. Raises ConfigError for a device that is not there.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"{verb}: --device cuda: torch finds no CUDA device here; use --device cpu")
    device = torch.device(options.device)
    cases = gpu_cases if device.type == "cuda" else cpu_cases
    if (layers := options.layers) is not None:
        sizes = options.d_model, options.heads, options.sequences, options.context, options.vocabulary
        cases = (Case(layers or None, *sizes),)
    if device.type == "cpu":
        torch.set_num_threads(1)
        keep_freed_memory()  # as a run does
        print(f"CPU time of one thread, fp32, {what}")
    else:
        print(f"{torch.cuda.get_device_name(device)}, bf16, {what}")
    return device, cases


def model_config(case: Case, towers: int, **tables: object) -> ModelConfig:
    """The config of a case with `towers` towers. `tables`: further keys of the config."""
    names = ("text", "image", "speech")
    values = {
        "num_layers": case.num_layers or 1,
        "d_model": case.d_model,
        "num_heads": case.num_heads,
        "context_tokens": case.context_tokens,
        "vocab_tokens": case.vocab_tokens,
        # Modalities are two in the case of two towers, else three; dense serves three with one.
        "towers": dict.fromkeys(names, "all") if towers == 1 else {name: name for name in names[:towers]},
    }
    return ModelConfig.model_validate(values | tables)


def random_batch(case: Case, modalities: int) -> Batch:
    """A batch of sequences with one document each, so that dense moves no row.

    Documents are spans of 64 to 256 tokens of one modality. There are no special tokens, because depth
    routing never skips these.
    """
    rng = np.random.default_rng(0)
    shape = (case.sequences, case.context_tokens)
    tokens = shape[0] * shape[1]
    shortest = max(1, case.context_tokens // 16)
    lengths = rng.integers(shortest, 4 * shortest + 1, size=-(-tokens // shortest))
    modality = (
        np.repeat(np.arange(lengths.size) % modalities, lengths)[:tokens].reshape(shape).astype(np.uint8)
    )
    ids, targets = rng.integers(len(SPECIAL_TOKENS), case.vocab_tokens, (2, *shape), dtype=np.int32)
    return Batch(
        input_ids=ids,
        target_ids=targets,
        loss_weights=np.ones(shape, np.float32),
        positions=np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape),
        document_ids=np.zeros(shape, np.int32),
        input_modality=modality,
        input_special=np.zeros(shape, bool),
        target_modality=modality,
        samples=((),) * shape[0],
    )


def model_pass(
    case: Case, config: ModelConfig, batch: Batch, device: torch.device
) -> tuple[torch.nn.Module, ModelInputs, ModelPass]:
    """(module, its inputs, the function that runs a pass) of a case."""
    dtype = dtype_on(device)
    decoder = Decoder(config).to(device, dtype)
    inputs = build_inputs(batch, config).to(device)
    if case.num_layers is not None:

        def run_decoder(module: torch.nn.Module, of: ModelInputs) -> RouterReport:
            objective, _, report = module(of)
            _backward(objective, module)
            return report

        return Pretraining(decoder), inputs, run_decoder
    rotary = rotary_table(inputs.positions, config.head_dim, config.rope_theta)
    x, grad = _stream(case, device, dtype)

    def run_block(block: torch.nn.Module, of: ModelInputs) -> RouterReport:
        out, report = block(x, of.routing, of.mask, rotary, of)
        _backward(out, block, x, grad)
        return RouterReport({0: report})

    return decoder.blocks[0], inputs, run_block


def _ours(case: Case, towers: int, device: torch.device) -> Callable[[], None]:
    config = model_config(case, towers)
    module, inputs, run = model_pass(case, config, random_batch(case, len(config.modalities)), device)
    return bound(module, inputs, run)


def bound(module: torch.nn.Module, inputs: ModelInputs, run: ModelPass) -> Callable[[], None]:
    """A pass that is only timed."""

    def timed() -> None:
        run(module, inputs)

    return timed


def _published(case: Case, towers: int, device: torch.device) -> Callable[[], None]:
    config, dtype = model_config(case, towers), dtype_on(device)
    decoder = PublishedDecoder(config)
    decoder.copy_weights(Decoder(config))
    decoder = decoder.to(device, dtype)
    batch = random_batch(case, towers)
    ids, targets, tower, positions = (
        torch.from_numpy(values.reshape(-1).astype(np.int64)).to(device)
        for values in (batch.input_ids, batch.target_ids, batch.input_modality, batch.positions)
    )
    if case.num_layers is not None:
        return lambda: _backward(decoder(ids, targets, tower, positions, case.sequences), decoder)
    block = decoder.blocks[0]
    masks = [tower == index for index in range(towers)]
    rotary = rotary_table(positions, config.head_dim, config.rope_theta)
    x, grad = _stream(case, device, dtype)
    return lambda: _backward(block(x, masks, rotary, case.sequences), block, x, grad)


def dtype_on(device: torch.device) -> torch.dtype:
    """The precision in which a device is timed."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _stream(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(residual stream that requires a gradient, gradient of a block's output)."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, case.sequences * case.context_tokens, case.d_model)
    x, grad = torch.randn(shape, generator=generator).to(device, dtype)
    return x.requires_grad_(), grad


def _backward(
    out: Tensor, module: torch.nn.Module, x: Tensor | None = None, grad: Tensor | None = None
) -> None:
    """Compute the gradients and drop them, as an engine does after a step."""
    out.backward(grad)
    module.zero_grad()
    if x is not None:
        x.grad = None


def _cpu_ms(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def _gpu_ms(run: Callable[[], None]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, (10, 90))
    return float(low), float(high)
