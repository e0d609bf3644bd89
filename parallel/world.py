"""Process groups and coordinates of a rank. Only this module starts torch.distributed and megatron-core."""

import gc
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from parallel import launch
from parallel.collectives import TensorParallel
from parallel.host_memory import keep_freed_memory
from parallel.layout import ParallelConfig, coordinates, data_parallel_size


@dataclass(frozen=True)
class World:
    """The coordinates, device and groups of this rank. All ranks make the same calls in the same order."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    device: torch.device
    dp_group: dist.ProcessGroup
    tp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    """All tensor- and pipeline-parallel ranks of this data-parallel coordinate, which train on one batch."""
    tensor_parallel: TensorParallel
    """The tensor-parallel ranks, in the form that layers take."""
    mpu: Any
    """The `mpu` argument of DeepSpeed, a `MegatronUnit`."""

    def sum_over_dp(self, values: Sequence[float]) -> list[float]:
        """The sums of values over the data-parallel ranks, in float64, equal on all of these ranks."""
        return self._sum(values, self.dp_group) if self.dp_size > 1 else [float(value) for value in values]

    def sum_over_all(self, values: Sequence[float]) -> list[float]:
        """The sums of values over all ranks, in float64; they are equal on all ranks."""
        return self._sum(values, None) if self.world_size > 1 else [float(value) for value in values]

    def _sum(self, values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=group)
        return total.tolist()

    def sum_tensor_over_all(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, on the host, for large numbers of values."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def same_in_model_group(self, value: int) -> bool:
        """Whether `value`, of up to 63 bits, is equal on all ranks of this data-parallel coordinate."""
        if self.tp_size * self.pp_size == 1:
            return True
        extremes = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.model_group)
        highest, lowest = extremes.tolist()
        return highest == -lowest

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def broadcast(self, value: Any, source_rank: int = 0) -> Any:
        """The picklable `value` of `source_rank`, on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source_rank, device=self.device)
        return box[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The picklable values of all ranks (of the group), in rank order, on all of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Wait until all ranks call it."""
        if self.world_size > 1:
            self.any(False)

    def shutdown(self) -> None:
        """Wait for all ranks and free the groups. After an error, exit instead: other ranks may be gone."""
        from deepspeed.comm import comm as deepspeed_comm

        from parallel.megatron import parallel_state

        self.barrier()
        parallel_state.destroy_model_parallel()
        deepspeed_comm.destroy_process_group()
        deepspeed_comm.cdb = None  # else the next start would take the destroyed group for initialized


class MegatronUnit:
    """The `mpu` argument of DeepSpeed, whose methods return megatron-core's groups.

    DeepSpeed 0.19.8 calls get_model_parallel_* (utils/groups.py:856), which megatron-core 0.16 lacks. Here
    model parallelism is the tensor axis.
    """

    def __init__(self) -> None:
        from parallel.megatron import parallel_state as state

        self.get_data_parallel_rank = state.get_data_parallel_rank
        self.get_data_parallel_world_size = state.get_data_parallel_world_size
        self.get_data_parallel_group = state.get_data_parallel_group
        self.get_tensor_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = state.get_tensor_model_parallel_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(_member(self.get_data_parallel_group()))


def import_libraries() -> None:
    """Import deepspeed and megatron-core, which takes seconds, without warnings that do not concern users."""
    # Libraries call each other's deprecated names, which a user cannot change.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    import deepspeed

    import parallel.megatron  # noqa: F401

    # init_distributed would compile DeepSpeed's shared-memory all-reduce if it finds a compiler (93 s at the
    # first use; comm/torch.py:47), which serves inference only. deepspeed/ops/__init__.py means this table to
    # be edited.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Imported objects live as long as the process, so the garbage collector need not search them. DeepSpeed
    # collects 18 times to set up stage 1 in bf16, which takes 0.2 s a time without this.
    gc.freeze()


def start(config: ParallelConfig, facts: launch.RankFacts | None = None) -> World:
    """Meet the other ranks and make the groups of the layout. A process without a launcher is a world of one.

    Raises ValueError for a layout that does not fit the number of ranks, LaunchError for a broken
    environment.
    """
    facts = launch.rank_facts() if facts is None else facts
    dp_size = data_parallel_size(config, facts.world_size)
    launch.prepare_environment(facts)
    import_libraries()
    import deepspeed

    from parallel.megatron import parallel_state

    device = launch.choose_device(facts)
    if device.type == "cpu":
        keep_freed_memory()
    timeout = timedelta(seconds=config.collective_timeout_s)
    backend = meet(facts, device, timeout)
    # DeepSpeed adopts the group made above. Its search for MPI is off, since launch.py reads the launchers.
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        distributed_timeout_minutes=max(1, config.collective_timeout_s // 60),
        create_gloo_process_groups=False,  # for megatron-core's own optimizer, which is not used
    )
    world = _describe(facts, config, device)
    assert world.dp_size == dp_size, (world, config)
    place = coordinates(config, facts.world_size, facts.rank)
    assert (world.pp_rank, world.dp_rank, world.tp_rank) == place, (world, place)
    return world


def _describe(facts: launch.RankFacts, config: ParallelConfig, device: torch.device) -> World:
    """This rank's World, from the groups that megatron-core has made."""
    from parallel.megatron import parallel_state

    tp_group = _member(parallel_state.get_tensor_model_parallel_group())
    return World(
        rank=facts.rank,
        world_size=facts.world_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        device=device,
        dp_group=_member(parallel_state.get_data_parallel_group()),
        tp_group=tp_group,
        model_group=_member(parallel_state.get_model_parallel_group()),
        tensor_parallel=TensorParallel(
            rank=parallel_state.get_tensor_model_parallel_rank(),
            size=config.tp,
            group=tp_group,
            sequence_parallel=config.sequence_parallel and config.tp > 1,
        ),
        mpu=MegatronUnit(),
    )


def meet(facts: launch.RankFacts, device: torch.device, timeout: timedelta, store: Any = None) -> str:
    """Start torch.distributed with the other ranks; returns its backend, NCCL on GPUs and Gloo elsewhere.

    `store`: the store at which they have met already, if they have.
    """
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    if facts.launcher == "torchrun" and store is None:  # env:// handles an agent that already holds the store
        dist.init_process_group(backend, init_method="env://", timeout=timeout)
    else:
        dist.init_process_group(
            backend,
            store=open_store(facts, timeout) if store is None else store,
            rank=facts.rank,
            world_size=facts.world_size,
            timeout=timeout,
        )
    return backend


def _member(group: "dist.ProcessGroup | int | None") -> dist.ProcessGroup:
    assert isinstance(group, dist.ProcessGroup), group  # an int means that this rank is not in the group
    return group


def open_store(facts: launch.RankFacts, timeout: timedelta, *, wait: bool = True) -> Any:
    """The store at which ranks meet, which rank 0 holds. `wait`: return when all ranks have come."""
    if facts.world_size == 1:
        return dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    return dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        facts.master_addr,
        facts.master_port,
        facts.world_size,
        is_master=facts.rank == 0,
        timeout=timeout,
        wait_for_workers=wait,
        master_listen_fd=facts.store_fd,
    )
