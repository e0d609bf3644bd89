"""This module imports what is used of megatron-core 0.16, without its warnings and without torch's compiler.

megatron-core hands its fused activations, none of which is used here, to torch.compile as it is imported
(core/jit.py). torch then imports its compiler, which takes 1.8 of 4.9 s of CPU time. The activations are
therefore left as they are. That spares the seconds of a process that only reads a model. DeepSpeed's engine
imports most of the compiler as it is set up, in 1.1 s.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "parallel_state",
    "set_tensor_model_parallel_attributes",
]


@contextmanager
def _without_compiler() -> Iterator[None]:
    """While the block runs, torch.compile gives functions back as they are."""

    def unchanged(function: Callable[..., Any] | None = None, **_: object) -> Any:
        return (lambda decorated: decorated) if function is None else function

    compiler = torch.compile
    torch.compile = unchanged
    try:
        yield
    finally:
        torch.compile = compiler


with warnings.catch_warnings(), _without_compiler():
    # megatron-core looks for Apex and Transformer Engine, which are not used.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        set_tensor_model_parallel_attributes,
    )
