"""The cost of a checkpoint, compared with DeepSpeed's (and its universal form) and torch's distributed one.

    python -m tools.bench.checkpoint --processes 2 --zero-stage 1

All methods take turns in the same processes and save the same engine after a step. `held`: seconds for which
training waits; `total`: seconds until everything is on disk; both are of the slowest rank. `peak`: the
largest increase of memory on a rank, in MiB.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel.launch import rank_facts
from parallel.spawn import spawn

Method = Callable[[Path], tuple[float, float]]
"""A function that saves into a folder and returns (held, total) seconds of this rank."""
MIB = 2**20


def main(argv: Sequence[str]) -> int:
    """Run the benchmark on `--processes` ranks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench.checkpoint", description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--zero-stage", type=int, choices=(1, 2, 3), default=1)
    parser.add_argument("--rounds", type=int, default=3, help="saves by each method (default %(default)s)")
    parser.add_argument("--d-model", type=int, default=512, help="of 3 layers of three towers")
    parser.add_argument("--folder", type=Path, help="where to write (default: the system's temporary folder)")
    args = parser.parse_args(argv)
    if rank_facts().world_size == 1 and args.processes > 1:
        ended = spawn(["-m", "tools.bench.checkpoint", *argv], args.processes)
        if ended.cause is not None:
            print(ended.cause, file=sys.stderr)
        return ended.exit_code
    print(measure(args), end="")
    return 0


def measure(args: argparse.Namespace) -> str:
    """Measure on all ranks; returns the report on rank 0 and "" on others."""
    from parallel import world
    from parallel.layout import ParallelConfig
    from pretrain.checkpoint.restore import restore

    w = world.start(ParallelConfig(zero_stage=args.zero_stage))
    engine = _trained(w, args)
    methods = _methods(engine, w)
    root = Path(w.broadcast(tempfile.mkdtemp(dir=args.folder) if w.rank == 0 else None))
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
    for number in range(args.rounds):
        for name, save in methods.items():
            rows[name].append(_save(w, save, root / f"{name}.{number}", convert=name == "DeepSpeed"))
    load_s = _timed(lambda: restore(root / "ours.0", _trained(w, args, steps=0), w))
    native = str(root / "DeepSpeed.0")
    theirs_s = _timed(lambda: _trained(w, args, steps=0).deepspeed.load_checkpoint(native, tag="a"))
    start_s = _timed(lambda: _trained(w, args, steps=0))
    elements = sum(w.gather(sum(f.count for f in engine.fragments() if f.replica == 0)))
    loads = f"ours {load_s - start_s:.1f} s, DeepSpeed's {theirs_s - start_s:.1f} s"
    lines = [
        f"ZeRO-{args.zero_stage}, {w.world_size} ranks, {elements / 1e6:.1f} M parameters",
        *(
            f"  {name:10} " + ", ".join(_summary(key, [row[key] for row in rounds]) for key in rounds[0])
            for name, rounds in rows.items()
        ),
        f"  loading, an engine's start of {start_s:.1f} s taken off: {loads}\n",
    ]
    w.barrier()
    if w.rank == 0:
        shutil.rmtree(root)
    w.shutdown()
    return "\n".join(lines) if w.rank == 0 else ""


def _save(w: Any, save: Method, folder: Path, *, convert: bool) -> dict[str, float]:
    """Save once; returns the times, memory and size. `convert`: also to DeepSpeed's universal form."""
    w.barrier()
    before = _reset_peak()
    held, total = save(folder)
    own = (held, total, (_memory("VmHWM") - before) / MIB)
    w.barrier()
    held, total, peak = (max(values) for values in zip(*w.gather(own), strict=True))
    row = {"held": held, "total": total, "peak": peak, "size": _size(folder) / MIB}
    if convert and w.rank == 0:
        row |= _universal(folder)
    w.barrier()
    return row


def _methods(engine: Any, w: Any) -> dict[str, Method]:
    """The methods of saving by name."""
    from torch.distributed.checkpoint.state_dict_saver import async_save

    from parallel.fragments import Fragment
    from pretrain.checkpoint.save import CheckpointWriter

    writers: dict[str, CheckpointWriter] = {}

    def ours(folder: Path) -> tuple[float, float]:
        # All saves use one writer, as in a run, whose first save makes the host buffer.
        writer = writers.setdefault("ours", CheckpointWriter(folder, engine, w, keep=99))
        writer._folder = folder
        held = _timed(lambda: writer.save(1, None))
        return held, held + _timed(writer.wait)

    def deepspeed(folder: Path) -> tuple[float, float]:
        held = _timed(lambda: engine.deepspeed.save_checkpoint(str(folder), tag="a", save_latest=False))
        return held, held

    def torchs(folder: Path) -> tuple[float, float]:
        own: list[Fragment] = [f for f in engine.fragments() if f.replica == 0]
        # torch describes only rectangles of a tensor, and a range of a flattened tensor is none. Written
        # under the name of its rank, it could be loaded on the same layout only.
        state = {f"{w.rank}/{f.name}/{k}": v.detach() for f in own for k, v in f.values.items()}
        started = time.perf_counter()
        future: Any = async_save(state, checkpoint_id=str(folder))
        held = time.perf_counter() - started
        return held, held + _timed(future.result)

    return {"ours": ours, "DeepSpeed": deepspeed, "torch": torchs}


def _trained(w: Any, args: argparse.Namespace, steps: int = 1) -> Any:
    """An engine of about 35 M parameters with the optimizer's states, after `steps` steps."""
    from parallel.adamw import adamw
    from parallel.zero_engine import ZeroEngine
    from pretrain.models.decoder import Decoder
    from pretrain.models.inputs import build_inputs
    from pretrain.models.pretraining import Pretraining
    from pretrain.optimizer_config import OptimizerConfig
    from pretrain.train.optimizer import parameter_groups
    from tools.bench.model import Case, model_config, random_batch

    case = Case(3, args.d_model, 8, 1, 64, 4096)
    config = model_config(case, 3)
    module: Any = Pretraining(Decoder(config, seed=1))
    module.universal_checkpoint_info = {"universal_checkpoint_version": 0.2}  # the conversion needs it
    engine = ZeroEngine(
        module,
        parameter_groups(
            module.named_parameters(), OptimizerConfig.model_validate({"learning_rate": 1e-3}), config
        ),
        w,
        optimizer=adamw(beta1=0.9, beta2=0.95, eps=1e-8),
        max_grad_norm=1.0,
        learning_rate_at=lambda step: 1e-3,
        zero_stage=args.zero_stage,
        prefix="decoder.",
    )
    for step in range(steps):
        engine.train_step([build_inputs(random_batch(case, 3), config)], step)
    return engine


def _universal(folder: Path) -> dict[str, float]:
    """Convert DeepSpeed's checkpoint to a form that other layouts can load, in another process; its cost."""
    command = ["-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += ["--num_merge_workers", "1", "--input_folder", str(folder / "a")]
    command += ["--output_folder", str(folder / "universal")]
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return {
        "conversion": time.perf_counter() - started,
        "converted": _size(folder / "universal") / MIB,
    }


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _size(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _reset_peak() -> int:
    """Reset the process's peak of resident memory; returns its resident memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _summary(key: str, values: Sequence[float]) -> str:
    unit = "s" if key in ("held", "total", "conversion") else "MiB"
    digits = 2 if unit == "s" else 0
    low, high = min(values), max(values)
    return f"{key} {statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f}) {unit}"


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
