"""Process groups and coordinates: the one place that starts torch.distributed and megatron-core's groups."""

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
    """This rank's coordinates, device and groups. All ranks make the same calls in the same order."""

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
    """All tensor- and pipeline-parallel ranks of this data-parallel coordinate: they train on one batch."""
    tensor_parallel: TensorParallel
    """The tensor-parallel ranks as the layers of the model want them."""
    mpu: Any
    """megatron-core's parallel_state with the method names that DeepSpeed calls; see `MegatronUnit`."""

    def sum_over_dp(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the data-parallel ranks, in float64. Equal on all of them."""
        return self._sum(values, self.dp_group) if self.dp_size > 1 else [float(value) for value in values]

    def sum_over_all(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over all ranks, in float64. Equal on all of them."""
        return self._sum(values, None) if self.world_size > 1 else [float(value) for value in values]

    def _sum(self, values: Sequence[float], group: dist.ProcessGroup | None) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=group)
        return total.tolist()

    def sum_tensor_over_all(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, on the host; for more numbers than a list is made for."""
        if self.world_size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.cpu()

    def same_in_model_group(self, value: int) -> bool:
        """True if all ranks of this data-parallel coordinate bring the same `value`, of up to 63 bits."""
        if self.tp_size * self.pp_size == 1:
            return True
        extremes = torch.tensor([value, -value], device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.model_group)
        highest, lowest = extremes.tolist()
        return highest == -lowest

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one of them."""
        if self.world_size == 1:
            return flag
        votes = torch.tensor([int(flag)], device=self.device)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return bool(votes.item())

    def broadcast(self, value: Any, source_rank: int = 0) -> Any:
        """The picklable `value` of `source_rank`, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=source_rank, device=self.device)
        return box[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The picklable values of all ranks (of the group), in rank order, on each of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        return values

    def barrier(self) -> None:
        """Return once every rank has come here."""
        if self.world_size > 1:
            self.any(False)

    def shutdown(self) -> None:
        """Leave together and free the groups. After an error just exit: the others may be gone."""
        from deepspeed.comm import comm as deepspeed_comm
        from megatron.core import parallel_state

        self.barrier()
        parallel_state.destroy_model_parallel()
        deepspeed_comm.destroy_process_group()
        deepspeed_comm.cdb = None  # it would answer "initialized" for the destroyed group at the next start


class MegatronUnit:
    """What DeepSpeed calls on its `mpu` argument, answered by megatron-core's groups.

    megatron-core 0.16 has no get_model_parallel_* for DeepSpeed 0.19.8 (utils/groups.py:856), for which model
    parallelism is everything that is not data parallelism; here that is the tensor axis.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state as state

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
    """Import deepspeed and megatron-core (seconds of work) without warnings that say nothing to our users."""
    # Libraries calling each other's older names: nothing that a user could mend, once per name and rank.
    warnings.filterwarnings(
        "ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning
    )
    with warnings.catch_warnings():
        # Apex and Transformer Engine, which megatron-core looks for, are not used here.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        import deepspeed
        import megatron.core.parallel_state
        import megatron.core.tensor_parallel  # noqa: F401

    # init_distributed compiles DeepSpeed's shared-memory all-reduce wherever it finds a compiler (93 s on the
    # first use; comm/torch.py:47). It serves inference only. This table is there to be edited
    # (deepspeed/ops/__init__.py).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # What was imported lives as long as the process: keep the garbage collector from looking through it.
    # DeepSpeed collects 18 times to set up stage 1 in bf16, 0.2 s each without this.
    gc.freeze()


def start(config: ParallelConfig, facts: launch.RankFacts | None = None) -> World:
    """Meet the other ranks and make the groups of the layout. One process without a launcher is a world of 1.

    Raises ValueError for a layout that this version cannot make, LaunchError for a broken environment.
    """
    facts = launch.rank_facts() if facts is None else facts
    dp_size = data_parallel_size(config, facts.world_size)
    launch.prepare_environment(facts)
    import_libraries()
    import deepspeed
    from megatron.core import parallel_state

    device = launch.choose_device(facts)
    if device.type == "cpu":
        keep_freed_memory()
    timeout = timedelta(seconds=config.collective_timeout_s)
    backend = meet(facts, device, timeout)
    # Adopts the group made above. Its search for MPI is off: our launchers are read in launch.py.
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tp,
        pipeline_model_parallel_size=config.pp,
        distributed_timeout_minutes=max(1, config.collective_timeout_s // 60),
        create_gloo_process_groups=False,  # for megatron-core's own optimizer, which is not used
    )
    tp_group = _member(parallel_state.get_tensor_model_parallel_group())
    world = World(
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
    assert world.dp_size == dp_size, (world, config)
    place = coordinates(config, facts.world_size, facts.rank)
    assert (world.pp_rank, world.dp_rank, world.tp_rank) == place, (world, place)
    return world


def meet(facts: launch.RankFacts, device: torch.device, timeout: timedelta, store: Any = None) -> str:
    """Start torch.distributed with the other ranks; returns its backend, NCCL on GPUs and Gloo elsewhere.

    `store`: where they have met already."""
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    if facts.launcher == "torchrun" and store is None:  # its agent may already hold the store; env:// knows
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
    assert isinstance(group, dist.ProcessGroup), group  # ints stand for "this rank is not in it"
    return group


def open_store(facts: launch.RankFacts, timeout: timedelta, *, wait: bool = True) -> Any:
    """The place where ranks meet, which rank 0 holds. `wait`: until all have come."""
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
