"""`motley bench data`: packed tokens per second of one thread, compared with other readers.

All readers read the same shards from the page cache, in turns, several times. The table also shows the CPU
time of all processes of a reader together, which a busy machine changes less.
"""

import argparse
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports of torch and webdataset take seconds, and --help needs none
    from data_pipeline.shards.index import TokenSource
    from data_pipeline.stream.stream import Stream

DOCUMENTS_PER_SHARD = 2_000
READERS = {
    "motley, ahead": "order, packing, reading with crc32, Batch; in a thread that reads ahead",
    "motley": "the same in the calling thread",
    "motley, plan alone": "order and packing of the global batch; nothing is read",
    "webdataset": "tar members -> ids in shard order; no shuffle, packing or Batch",
    "raw, same order": "one pread a document at a known offset; no check, packing or Batch",
    "raw, in file order": "each shard read as one array",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write shards into a temporary folder, time all readers on them and print a table."""
    args = parser().parse_args(argv)
    from data_pipeline.files.progress import Progress
    from data_pipeline.stream.stream import Stream

    with tempfile.TemporaryDirectory(prefix="motley-bench-data-", dir=args.folder) as folder:
        source = _make_shards(Path(folder), args.documents)
        stream = Stream(
            [(source, 1.0)],
            seed=1,
            context_tokens=args.context_tokens,
            sequences_per_step=args.sequences_per_step,
        )
        num_steps = max(1, args.tokens // (args.context_tokens * args.sequences_per_step))
        runs = _readers(stream, source, num_steps)
        rates: dict[str, list[float]] = {name: [] for name in runs}
        cpu_s: dict[str, list[float]] = {name: [] for name in runs}
        with Progress("bench data", total=args.repeats * len(runs), unit="runs") as progress:
            for _ in range(args.repeats):
                for name, run in runs.items():  # readers take turns, so that a busy moment slows all of them
                    begin_cpu_s = _cpu_s()
                    tokens, seconds = run()
                    rates[name].append(tokens / seconds / 1e6)
                    cpu_s[name].append((_cpu_s() - begin_cpu_s) / tokens * 1e6)
                    progress.advance()
        filled = sum(plan.filled_slots for plan in _plans(stream, num_steps))
        fill_frac = filled / (num_steps * stream.sequences_per_step * stream.context_tokens)
    print("\n".join(_table(rates, cpu_s)))
    print(
        f"Mtokens/s: median and range of {args.repeats} runs in turns; {num_steps} steps of "
        f"{args.sequences_per_step} x {args.context_tokens} slots, {100 * fill_frac:.2f} % filled; "
        f"{os.cpu_count()} cores"
    )
    print(
        f"motley bench data --documents {args.documents} --tokens {args.tokens} --context-tokens "
        f"{args.context_tokens} --sequences-per-step {args.sequences_per_step} --repeats {args.repeats}"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the verb's options."""
    top = argparse.ArgumentParser(prog="motley bench data", description=__doc__)
    top.add_argument("--documents", type=int, default=20_000, help="in the shards (default %(default)s)")
    top.add_argument("--tokens", type=int, default=8_000_000, help="slots a run reads (default %(default)s)")
    top.add_argument("--context-tokens", type=int, default=4_096, help="default %(default)s")
    top.add_argument("--sequences-per-step", type=int, default=8, help="read as one (default %(default)s)")
    top.add_argument("--repeats", type=int, default=7, help="runs of each reader (default %(default)s)")
    top.add_argument("--folder", default=None, help="where to write the shards (default: the system's /tmp)")
    return top


def _make_shards(folder: Path, num_documents: int) -> "TokenSource":
    """Write shards of random documents, print their sizes and open them."""
    import numpy as np

    from data_pipeline.shards.index import TokenSource
    from data_pipeline.shards.synthetic import random_documents, write_token_folder
    from data_pipeline.shards.vocabulary import Vocabulary

    vocabulary = Vocabulary(sizes={"text": 32_000, "image": 8_192, "speech": 512})
    documents = random_documents(vocabulary, num_documents, 1, median_text_tokens=400, image_tokens=256)
    write_token_folder(folder, list(documents), vocabulary, documents_per_shard=DOCUMENTS_PER_SHARD)
    begin = time.perf_counter()
    source = TokenSource.open(folder)
    seconds = time.perf_counter() - begin
    shards = source.manifest["shards"]
    print(
        f"{source.num_documents:,} documents of {int(np.median(source.lengths)):,} ids (median) to "
        f"{int(source.lengths.max()):,}, {int(source.lengths.sum(dtype=np.int64)):,} ids in "
        f"{len(shards)} shards, {sum(shard['bytes'] for shard in shards) / 1e6:.1f} MB; "
        f"indexed in {seconds:.2f} s"
    )
    return source


def _readers(
    stream: "Stream", source: "TokenSource", num_steps: int
) -> dict[str, Callable[[], tuple[int, float]]]:
    """By name of a reader, a function that reads everything once: (tokens, seconds).

    Tokens are filled slots, or ids if the reader packs nothing.
    """
    runs = (
        lambda: _load(stream, num_steps, prefetch_steps=2),
        lambda: _load(stream, num_steps, prefetch_steps=0),
        lambda: _plan_alone(stream, num_steps),
        lambda: _webdataset(source),
        _same_order(stream, source, num_steps),
        lambda: _file_order(source),
    )
    return dict(zip(READERS, runs, strict=True))


def _load(stream: "Stream", num_steps: int, *, prefetch_steps: int) -> tuple[int, float]:
    from data_pipeline.stream.loader import Loader

    step_slots = stream.sequences_per_step * stream.context_tokens
    with Loader(
        stream,
        dp_rank=0,
        dp_size=1,
        micro_batch_sequences=stream.sequences_per_step,
        prefetch_steps=prefetch_steps,
    ) as loader:
        loader.next_step()  # start-up is not measured
        begin = time.perf_counter()
        filled = sum(loader.next_step().fill_frac * step_slots for _ in range(num_steps))
        return round(filled), time.perf_counter() - begin


def _plan_alone(stream: "Stream", num_steps: int) -> tuple[int, float]:
    begin = time.perf_counter()
    filled = sum(plan.filled_slots for plan in _plans(stream, num_steps))
    return filled, time.perf_counter() - begin


def _urls(source: "TokenSource") -> list[str]:
    return [str(source.folder / entry["name"]) for entry in source.manifest["shards"]]


def _webdataset(source: "TokenSource") -> tuple[int, float]:
    import numpy as np
    from webdataset.compat import WebDataset

    begin = time.perf_counter()
    samples = WebDataset(_urls(source), shardshuffle=False, empty_check=False)
    ids = sum(len(np.frombuffer(sample["ids"], source.vocabulary.dtype)) for sample in samples)
    return ids, time.perf_counter() - begin


def _same_order(stream: "Stream", source: "TokenSource", num_steps: int) -> Callable[[], tuple[int, float]]:
    """A function that reads the stream's documents in its order; the order is computed before."""
    import numpy as np

    dtype = source.vocabulary.dtype
    documents = np.concatenate([plan.document[plan.start == 0] for plan in _plans(stream, num_steps)])
    locations = [
        (source.shard_of(i), int(source.lengths[i]) * dtype.itemsize, int(source.index.offset[i]))
        for i in documents.tolist()
    ]

    def read() -> tuple[int, float]:
        files = [os.open(url, os.O_RDONLY) for url in _urls(source)]
        begin = time.perf_counter()
        ids = sum(
            len(np.frombuffer(os.pread(files[shard], size, offset), dtype))
            for shard, size, offset in locations
        )
        seconds = time.perf_counter() - begin
        for file in files:
            os.close(file)
        return ids, seconds

    return read


def _file_order(source: "TokenSource") -> tuple[int, float]:
    import numpy as np

    begin = time.perf_counter()
    for url in _urls(source):
        np.fromfile(url, source.vocabulary.dtype)
    return int(source.lengths.sum(dtype=np.int64)), time.perf_counter() - begin


def _plans(stream: "Stream", num_steps: int) -> list:
    """The plans of the first steps, from a new stream that has cached none of them."""
    from data_pipeline.stream.stream import Stream

    fresh = Stream(
        [(source, float(share)) for source, share in zip(stream.sources, stream.shares, strict=True)],
        seed=stream.seed,
        context_tokens=stream.context_tokens,
        sequences_per_step=stream.sequences_per_step,
    )
    state, plans = fresh.start(), []
    for _ in range(num_steps):
        plan, state = fresh.plan_step(state)
        plans.append(plan)
    return plans


def _cpu_s() -> float:
    """CPU seconds of this process and of its child processes that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _table(rates: dict[str, list[float]], cpu_s: dict[str, list[float]]) -> list[str]:
    webdataset = statistics.median(rates["webdataset"])
    columns = ("Mtokens/s", "min", "max", "x webdataset", "CPU ms/Mtoken")
    lines = [f"{'reader':<18} " + " ".join(f"{name:>{max(8, len(name))}}" for name in columns)]
    for name, values in rates.items():
        median = statistics.median(values)
        lines.append(
            f"{name:<18} {median:>9.2f} {min(values):>8.2f} {max(values):>8.2f} {median / webdataset:>12.2f} "
            f"{1e3 * statistics.median(cpu_s[name]):>13.2f}  {READERS[name]}"
        )
    return lines
