"""Sums over real ranks, and the row that rank 0 writes."""

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import validate
from data_pipeline.stream.batch import make_batch
from data_pipeline.stream.loader import StepBatch
from data_pipeline.stream.stream import StreamState
from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.config import RunConfig
from pretrain.metrics import read_rows
from pretrain.models.accounting import train_flops
from pretrain.models.inputs import build_inputs
from pretrain.models.router_report import RouterReport
from pretrain.run_dir import RunDir
from pretrain.train.meter import Meter
from pretrain.train.rising_loss import FIRST_ROWS, ROWS_ABOVE
from pretrain.train.state import TrainState
from tests.pretrain.tiny_data import CONTEXT_TOKENS, VOCABULARY, tiny_run

STREAM = StreamState(0, 0, 0, seed=3, context_tokens=CONTEXT_TOKENS, sources=(("hash", "1"),))
BATCH = StepBatch(
    (), (), STREAM, wait_s=0.5, fill_frac=0.75, epochs=(0.25, 1.5), digest=0xABC, unreadable=("a/1",)
)
IMAGE, SPEECH = VOCABULARY.start("image"), VOCABULARY.start("speech")
DOCUMENTS = ([1, 9, 10, 11, 2], [1, 3, IMAGE, IMAGE + 1, 4, 9, 2], [1, 5, SPEECH, 6, 2])


def _measure(folder: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Two steps, each rank with a share of DOCUMENTS; rank 0 writes the row."""
    w = world.start(ParallelConfig())
    config = validate(RunConfig, tiny_run(Path(folder), Path(folder)), source="test")
    mine = [np.array(document) for document in DOCUMENTS[w.rank :: w.world_size]]
    inputs = [
        build_inputs(
            make_batch(
                [[document]],
                sequence_tokens=CONTEXT_TOKENS,
                vocabulary=VOCABULARY,
                targets=[[document[1:] < IMAGE]],
            ),
            config.model,
        )
        for document in mine
    ]
    result = StepResult(
        [30.0, 8.0, 6.0, 10.0, 2.0, 1.0], 13.0, 2.0, {"text": 1.5, "image": 0.5, "speech": 0.0}, 1e-3
    )
    run = RunDir.open(config, world_size=w.world_size, command=[]) if w.rank == 0 else None
    state = TrainState.start(STREAM)
    with Meter(config, w, run, state, num_too_long=4) as meter:
        sums = {}
        for _ in range(2):
            with meter.timing():
                pass
            sums = meter.sums(BATCH, inputs, result, RouterReport())
            state = state.advance(BATCH, sums)
            meter.show(state)
        state = meter.log(state, result, {"eval/loss": 3.5})
        state = meter.log(state.advance(BATCH, sums), result, {})
        meter.sync()
    assert state.window == {} and state.num_rows == 2
    w.barrier()
    return sums, read_rows(config.run_dir / "metrics.jsonl")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_flops_are_those_of_the_global_batch_and_the_row_says_all(tmp_path: Path, ranks: int):
    answers = run_on_ranks(_measure, ranks, str(tmp_path))
    config = validate(RunConfig, tiny_run(tmp_path, tmp_path), source="test")
    inputs = np.concatenate([document[:-1] for document in DOCUMENTS])
    counts = np.bincount(VOCABULARY.modality_of(inputs), minlength=3).tolist()
    pairs = sum((n - 1) * n // 2 for n in map(len, DOCUMENTS))
    flops = train_flops(config.model, dict(zip(VOCABULARY.modalities, counts, strict=True)), pairs)
    for sums, _ in answers:
        assert sums["flops"] == flops
        assert sums["masked_targets"] == 3, "two codes of a picture and one of a sound"
        assert (sums["loss/text"], sums["weight/speech"], sums["tokens"]) == (30.0, 1.0, 256)
    row, later = answers[0][1]
    assert row["step"] == 2
    assert row["tokens"] == 512
    assert row["compute/train_flops"] == 2 * flops
    assert row["train/loss/text"] == 3.0 and row["train/loss"] == 44.0 / 13.0
    assert row["train/tokens/text"] == 20
    assert row["eval/loss"] == 3.5
    assert row["optim/learning_rate"] == 1e-3 and row["optim/grad_norm/text"] == 1.5
    assert row["time/data_wait_s"] == 0.5 and 1.0 <= row["time/train_s"] < 1.5
    assert (row["data/fill_frac"], row["data/epoch"], row["data/fingerprint"]) == (
        0.75,
        1.5,
        f"{2 * 0xABC:016x}",
    )
    assert (row["data/unreadable"], row["data/unreadable_documents"], row["data/too_long"]) == (1, ["a/1"], 4)
    assert later["data/unreadable"] == 1 and "data/unreadable_documents" not in later
    assert (row["data/masked_targets"], later["data/masked_targets"]) == (6, 9)
    assert row["memory/peak_bytes"] > 1 << 20
    peak = row["compute/train_flops"] / row["time/train_s"] / row["speed/mfu_frac"]
    assert peak > ranks * 1e8  # FLOP/s of a core, at least; see test_device_peak.py


def _rise(folder: str) -> list[str]:
    """What rank 0 prints in two attempts of a run whose loss is 3 nats/token in three rows and then 30."""
    w = world.start(ParallelConfig())
    config = validate(RunConfig, tiny_run(Path(folder), Path(folder)), source="test")
    state = TrainState.start(STREAM)
    said = []
    for num_rows in (FIRST_ROWS + ROWS_ABOVE + 5, 5):
        run = RunDir.open(config, world_size=1, command=[])
        with redirect_stdout(StringIO()) as out, Meter(config, w, run, state, num_too_long=0) as meter:
            for _ in range(num_rows):
                nats = 30.0 if state.step < FIRST_ROWS else 300.0
                result = StepResult([nats, 0.0, 0.0, 10.0, 0.0, 0.0], 13.0, 2.0, {}, 1e-3)
                with meter.timing():
                    pass
                state = state.advance(BATCH, meter.sums(BATCH, (), result, RouterReport()))
                state = meter.log(state, result, {})
        run.close(status="stopped", reason="", exit_code=85, step=state.step)
        said.append(out.getvalue())
    return said


def test_a_loss_that_stays_above_its_start_is_said_once(tmp_path: Path):
    (said,) = run_on_ranks(_rise, 1, str(tmp_path))
    assert said[0].startswith(f"warning: step {FIRST_ROWS + ROWS_ABOVE}: ") and said[0].count("\n") == 1
    assert said[1] == ""
