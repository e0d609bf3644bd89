"""Memory of DeepSpeed 0.19.8 on a rank, in bytes, with the settings of parallel/deepspeed_config.py.

A model's trainable parameters are given as groups (name -> sizes in order); sizes count the elements on this
tensor-parallel rank and pipeline stage. Stages 1 and 2 join a group to one flat tensor, padded to a multiple
of 2 dp elements (nccl_start_alignment_factor); stage 3 pads every parameter to a multiple of dp. b is 2 bytes
in bf16 and 4 in fp32; s is OptimizerSpec.state_bytes, 8 for AdamW:

    stage        parameters      gradients                            optimizer (fp32 master, states)
    0 fp32       4 n             4 n                                  s n: on the parameters themselves
    1 fp32       4 flat          4 n: whole until the step            (4 + s) flat / dp
    1 bf16       2 flat          4 flat + 2 n: see below              (4 + s) flat / dp
    2 fp32       4 flat          4 (whole parameters that this        (4 + s) flat / dp
                                 rank has any part of)
    2 bf16       2 flat          4 flat / dp                          (4 + s) flat / dp
    3            b parts         4 parts                              (4 + s) parts

Sources, below deepspeed/runtime: stages 1 in fp32 and 2 zero/stage_1_and_2.py (flat tensors line 505,
master 560, gradients of stage 2 in fp32 2142, in bf16 1268); stage 1 in bf16 bf16_optimizer.py (flat 167,
master 182; 191 the gradients of the whole model in fp32, to which those of a backward pass, in bf16, are
added only when it is over, as immediate_grad_update is off); stage 3 zero/stage3.py (gradients 791) and
zero/partition_parameters.py (parts 1690). In stage 3 small parameters (PERSISTENT_ELEMENTS) also stay whole,
which takes b n more. This module imports no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from parallel.deepspeed_config import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from parallel.layout import Precision

Groups = Mapping[str, Sequence[int]]
ZeroStage = Literal[0, 1, 2, 3]

_FP32 = 4
_ENGINE_BUCKET_ELEMENTS = 500_000_000
"""Bucket of gradients in stage 0, and in stage 1 with bf16 (MEMORY_OPT_ALLREDUCE_SIZE, engine.py:151)."""
_SUB_GROUP_ELEMENTS = _LIVE_ELEMENTS = 1_000_000_000
"""Defaults of sub_group_size and stage3_max_live_parameters, zero/config.py:182, 245."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one rank that last from step to step, with gradients at their peak."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0

    def __add__(self, other: "MemoryUse") -> "MemoryUse":
        return MemoryUse(
            self.parameters + other.parameters,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
        )

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def group_memory(
    sizes: Sequence[int],
    *,
    dp: int,
    zero_stage: ZeroStage,
    precision: Precision,
    state_bytes: int,
    dp_rank: int | None = None,
) -> MemoryUse:
    """The memory of a group of trainable parameters.

    `state_bytes`: OptimizerSpec.state_bytes. `dp_rank` matters only in stage 2 with fp32; None: the rank with
    the most memory.
    """
    b = element_bytes(precision)
    n, flat = sum(sizes), _flat(sizes, dp)
    if zero_stage == 0:
        return MemoryUse(_FP32 * n, _FP32 * n, state_bytes * n)
    if zero_stage == 3:
        parts = _parts(sizes, dp)
        whole = sum(size for size in sizes if size <= PERSISTENT_ELEMENTS) if dp > 1 else 0
        return MemoryUse(b * (parts + whole), _FP32 * parts, (_FP32 + state_bytes) * parts)
    optimizer = (_FP32 + state_bytes) * flat // dp
    if zero_stage == 1:
        return MemoryUse(b * flat, _FP32 * n if precision == "fp32" else _FP32 * flat + b * n, optimizer)
    if precision == "bf16":
        return MemoryUse(b * flat, _FP32 * flat // dp, optimizer)
    ranks = range(dp) if dp_rank is None else (dp_rank,)
    return MemoryUse(
        b * flat, _FP32 * max(sum(_touched(sizes, rank, flat // dp)) for rank in ranks), optimizer
    )


def frozen_memory(sizes: Sequence[int], *, dp: int, zero_stage: ZeroStage, precision: Precision) -> MemoryUse:
    """The memory of a group of frozen parameters; only stage 3 shards them."""
    if zero_stage == 3:
        cut = group_memory(sizes, dp=dp, zero_stage=3, precision=precision, state_bytes=0)
        return MemoryUse(cut.parameters)
    return MemoryUse(element_bytes(precision) * sum(sizes))


def update_copy(
    groups: Groups, *, dp: int, zero_stage: ZeroStage, precision: Precision, dp_rank: int | None = None
) -> int:
    """Bytes of the joined gradient that an update makes of one group at a time, beside the gradients.

    Stage 2 in fp32: zero/stage_1_and_2.py:3107, while the gradients keep their one buffer until the last
    group; a part within one parameter is not copied. Stage 3: zero/stage3.py:2683, a sub-group at a time.
    Stage 1 in fp32 frees the gradients that it has joined; in bf16, stages 1 and 2 join nothing.
    """
    most = 0
    for sizes in groups.values():
        if zero_stage == 2 and precision == "fp32":
            part = _flat(sizes, dp) // dp
            ranks = range(dp) if dp_rank is None else (dp_rank,)
            most = max(most, part if any(len(_touched(sizes, rank, part)) > 1 for rank in ranks) else 0)
        elif zero_stage == 3:
            most = max(most, *_sub_groups(sizes, dp))
    return _FP32 * most


def matrix_copies(groups: Groups, *, dp: int, tp: int, zero_stage: ZeroStage) -> int:
    """Upper bound on the bytes that Muon's update makes of one group at a time (parallel/muon_steps.py).

    They are the update of a partition in fp32 and in bf16, the matrices on borders of partitions in bf16, and
    six copies in bf16 of the largest parameter, over tensor-parallel ranks.
    """
    most = 0
    for sizes in groups.values():
        largest = max(sizes)
        partition = largest if zero_stage == 0 else _flat(sizes, dp) // dp
        border = min(sum(sizes), (dp - 1) * largest) if zero_stage else 0
        most = max(most, (_FP32 + 2) * partition + 2 * border + 6 * 2 * tp * largest)
    return most


def buffers(groups: Groups, *, dp: int, zero_stage: ZeroStage, precision: Precision) -> int:
    """Upper bound on the bytes of communication buffers, which live only within a step.

    Stage 0, and stage 1 in bf16: tensors that share a bucket are joined in fp32 (engine.py:3795, 3828; a
    tensor alone is not copied). Stage 1 in fp32, and stage 2: buckets of BUCKET_ELEMENTS, with flattened and
    cast copies (zero/stage_1_and_2.py:2359, 3256). Stage 3: the same bucket, which is kept
    (zero/stage3.py:782), and gathered parameters up to stage3_max_live_parameters plus the bucket that is
    fetched ahead.
    """
    b = element_bytes(precision)
    n = sum(map(sum, groups.values()))
    bucket = min(BUCKET_ELEMENTS, n)
    if zero_stage == 0:
        return _FP32 * _joined([size for sizes in groups.values() for size in sizes])
    if zero_stage == 1:
        if precision == "fp32":
            return _FP32 * bucket
        return _FP32 * _joined([_flat(sizes, dp) for sizes in groups.values()])
    if zero_stage == 2:
        staged = b * BUCKET_ELEMENTS
        return staged + b * bucket + (_FP32 * bucket if precision == "bf16" else 0)
    gathered = min(n, _LIVE_ELEMENTS + BUCKET_ELEMENTS)
    return _FP32 * BUCKET_ELEMENTS + _FP32 * bucket + b * gathered


def element_bytes(precision: Precision) -> int:
    """Bytes of one element of a parameter or an activation."""
    return 2 if precision == "bf16" else 4


def _flat(sizes: Sequence[int], dp: int) -> int:
    return -(-sum(sizes) // (2 * dp)) * 2 * dp


def _parts(sizes: Sequence[int], dp: int) -> int:
    return sum(-(-size // dp) for size in sizes)


def _touched(sizes: Sequence[int], rank: int, part: int) -> list[int]:
    """Sizes of the parameters that lie, wholly or partly, in part `rank` of their flat tensor."""
    ends = list(accumulate(sizes))
    first, last = rank * part, (rank + 1) * part
    return [size for size, end in zip(sizes, ends, strict=True) if end - size < last and end > first]


def _sub_groups(sizes: Sequence[int], dp: int) -> Iterator[int]:
    """The numbers of elements of stage 3's sub-groups (zero/stage3.py:1213)."""
    elements = 0
    for size in sizes:
        elements += -(-size // dp)
        if elements >= _SUB_GROUP_ELEMENTS:
            yield elements
            elements = 0
    yield elements


def _joined(sizes: Sequence[int]) -> int:
    """Elements of the largest bucket with more than one tensor; a bucket closes once it exceeds its size."""
    most, bucket = 0, []
    for size in sizes:
        bucket.append(size)
        if len(bucket) > 1:
            most = max(most, sum(bucket))
        if sum(bucket) > _ENGINE_BUCKET_ELEMENTS:
            bucket = []
    return most
