"""Tensor-parallel ranks decode what one process decodes: logits, choices of routers, and files."""

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.files.toml_config import ConfigError
from parallel.logical import logical_of
from parallel.testing import run_on_ranks
from parallel.world import World, start
from pretrain.generation.continuation import continue_prompts
from pretrain.generation.processes import check_processes, layout_of, work_in_processes
from pretrain.generation.sampling import Sampling
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.generation.test_decoding import (
    MODELS,
    TOLERANCE,
    in_one_pass,
    routing_of,
    token_by_token,
)
from tests.pretrain.generation.test_images import GRAMMAR, prompts
from tests.pretrain.models.random_batch import DENSE, MOT, tiny_config
from tests.pretrain.models.vector_batch import vector_config
from tests.pretrain.tiny_data import VOCABULARY
from tools.cli import main

NAMES = ("dense_all_heads", "elements", "expert_choice", "depth_selected")
"""Models of test_decoding.py: with and without grouped queries, and everything that ranks cut or choose."""


@torch.no_grad()
def cut_weights(whole: Decoder, part: Decoder, world: World) -> None:
    """Give a rank's decoder its part of the weights."""
    wholes = dict(whole.named_parameters())
    for key, parameter in part.named_parameters():
        parameter.copy_(logical_of(parameter).cut(wholes[key], world.tp_rank, world.tp_size))


def on_a_rank(names: tuple[str, ...]) -> dict[str, tuple[float, float, bool]]:
    """By model: the largest difference in fp64 and in fp32 between tokens one by one on two ranks and one
    pass of the whole decoder, relative to the largest logit; and whether the same tokens ran."""
    world, found = start(layout_of(2)), {}
    for name in names:
        towers, changes = MODELS[name]
        model = tiny_config(towers, context_tokens=64, vocab_tokens=VOCABULARY.size, **changes)
        state, whole = routing_of(model), perturbed(model).eval()
        part = Decoder(model, tp=world.tensor_parallel).eval()
        cut_weights(whole, part, world)
        differences, same = [], True
        for dtype in (torch.float64, torch.float32):
            expected, expected_ran = in_one_pass(whole.to(dtype), state)
            logits, ran, cache = token_by_token(part.to(dtype), state)
            scale = max(float(each.abs().max()) for each in expected)
            rows = (
                (row, wanted[at - 1])
                for of, wanted in zip(logits, expected, strict=True)
                for at, row in of.items()
            )
            differences.append(max(float((row - wanted).abs().max()) for row, wanted in rows) / scale)
            same = same and all(np.array_equal(a, b) for a, b in zip(ran, expected_ran, strict=True))
        assert cache.held_bytes > 0
        found[name] = (*differences, same)
    found["images"] = images_on_a_rank(world)
    return found


def images_on_a_rank(world: World) -> tuple[float, float, bool]:
    """The largest difference between vectors of samples by two ranks and by the whole decoder, in fp64 and,
    as there is one for both, once more; and whether the ids are the same."""
    config = vector_config(MOT)
    whole = perturbed(config).double().eval()
    part = Decoder(config, tp=world.tensor_parallel).double().eval()
    cut_weights(whole, part, world)
    first, second = (
        [
            sample
            for of_prompt in continue_prompts(
                decoder, prompts(), GRAMMAR, Sampling(image_steps=3), RoutingState(), samples=2
            )
            for sample in of_prompt
        ]
        for decoder in (whole, part)
    )
    vectors = [
        np.concatenate([each.vectors["image"] for each in of if each.vectors]) for of in (first, second)
    ]
    assert len(vectors[0]) > 0
    difference = float(np.abs(vectors[0].astype(np.float64) - vectors[1]).max())
    same = all(a.ids.tolist() == b.ids.tolist() for a, b in zip(first, second, strict=True))
    return difference, difference, same


def test_token_by_token_on_two_ranks_equals_one_pass_of_one() -> None:
    first, second = run_on_ranks(on_a_rank, 2, NAMES)
    assert first == second
    for name, (in_fp64, in_fp32, same) in first.items():
        assert in_fp64 <= TOLERANCE[torch.float64] and in_fp32 <= TOLERANCE[torch.float32], name
        assert same, name


def verb_on_a_rank(words: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `motley` in a rank that the launcher started."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_ranks_write_what_one_process_writes(
    speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, by rank 0. In fp32 a last bit could turn a draw; of these draws it turns none."""

    def words(out: str, *more: str) -> list[str]:
        return [
            "generate", str(speaker / "routed"), "--tokenizers", str(speaker / "tokenizers"),
            "--out", str(tmp_path / out), "--prompt", "A red 3", "--samples", "3", *more,
        ]  # fmt: skip

    assert main(words("one")) == 0
    told = capsys.readouterr().out
    (code, out, _), (other_code, other_out, _) = run_on_ranks(
        verb_on_a_rank, 2, words("two", "--processes", "2")
    )
    assert (code, other_code, other_out) == (0, 0, "")
    assert out == told.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_model_that_ranks_cannot_share_is_refused() -> None:
    grouped, odd = tiny_config(MOT, num_kv_heads=1), tiny_config(DENSE, vocab_tokens=41)
    for model in (grouped, odd):
        with pytest.raises(ConfigError, match=r"--processes 2: parallel\.tp = 2 does not divide model\."):
            check_processes(model, 2)
        check_processes(model, 1)
    with pytest.raises(ConfigError, match="--processes 0: at least 1"):
        work_in_processes("generate", [], 0, lambda _: None)
