"""`motley audit`: how often a run consumed each document, in which step, and whether two runs read the same.

All of it follows from the index and the run's files. The fingerprints in metrics.jsonl, which ranks made of
the bytes that they read, are compared with those of the plan.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from pretrain.audit.contents import differing_rows, digest_of, documents_of_name
from pretrain.audit.steps import ConsumedStep, RunData, consumed_steps, open_run

_TIMES = {0: "never", 1: "once", 2: "twice"}


def audit(path: Path, *, documents: Path | None = None, name: str | None = None) -> bool:
    """Print what a run consumed; whether its files agree with its plan.

    `documents`: a CSV file to write, a line for every piece of a document in every step. `name`: "shard/key"
    of a document whose steps are printed. Raises ConfigError.
    """
    run = open_run(path)
    steps = list(consumed_steps(run))
    lines, agrees = _fingerprints(run, steps)
    for number, source in enumerate(run.stream.sources):
        lines += _source_lines(run, steps, number, source)
    if name is not None:
        lines += _document_lines(run, steps, name)
    print("\n".join([_head(run), *lines]))
    if documents is not None:
        _write(documents, run, steps)
    return agrees


def compare(path: Path, other: Path) -> bool:
    """Print whether two runs consumed the same, in the same steps; whether they did."""
    runs = [open_run(path), open_run(other)]
    digests = [[digest_of(run.stream, step.plan) for step in consumed_steps(run)] for run in runs]
    equal = 0
    for one, theirs in zip(*digests, strict=False):
        if one != theirs:
            break
        equal += 1
    made = [len(digest) for digest in digests]
    if equal == max(made):
        print(f"{path} and {other} consumed the same documents in the same order, in {equal} steps")
        return True
    if equal == min(made):
        longer = path if made[0] > made[1] else other
        print(f"the first {equal} steps consumed the same; {longer} went on to step {max(made)}")
    else:
        print(
            f"steps 1 ... {equal} consumed the same, step {equal + 1} did not" if equal else "step 1 differs"
        )
    print("\n".join(_shared(runs)))
    return False


def _head(run: RunData) -> str:
    lost = sum(not went.is_kept for went in run.went)
    left_out = f", {lost} of which are not in the weights (spikes)" if lost else ""
    size = run.stream.sequences_per_step
    return f"{run.folder}: {len(run.went)} steps of {size} sequences consumed{left_out}"


def _fingerprints(run: RunData, steps: Sequence[ConsumedStep]) -> tuple[list[str], bool]:
    """(a line on the fingerprints of rows, whether all are those of the plan)."""
    found = list(differing_rows(run, steps))
    wrong = [step for step, agrees in found if not agrees]
    if not found:
        return ["no row of metrics has a fingerprint: what ranks read cannot be compared with the plan"], True
    if wrong:
        before = [step for step, _ in found if step < wrong[0]]
        return [
            f"DIFFERS: after step {before[-1] if before else 0}, by step {wrong[0]}, ranks read other bytes "
            "than these shards hold in this order; the counts below are those of the plan"
        ], False
    return [f"what ranks read is what was planned: the fingerprints of all {len(found)} rows agree"], True


def _source_lines(run: RunData, steps: Sequence[ConsumedStep], number: int, source: TokenSource) -> list[str]:
    """Lines on one source: how many of its documents were consumed how often."""
    slots = slots_read(steps, number, source)
    length = np.maximum(source.lengths.astype(np.int64) - 1, 1)
    too_long = run.stream.too_long[number]
    usable = np.setdiff1d(np.arange(source.num_documents), too_long)
    passes, rest = slots[usable] // length[usable], slots[usable] % length[usable]
    kept = slots_read([step for step in steps if step.went.is_kept], number, source)
    counts = dict(zip(*(found.tolist() for found in np.unique(passes, return_counts=True)), strict=True))
    often = ", ".join(f"{_TIMES.get(times, f'{times} times')}: {count:,}" for times, count in counts.items())
    lines = [f"{source.folder}: {source.num_documents:,} documents, consumed {often}"]
    if partly := int((rest > 0).sum()):
        lines.append(f"  {partly:,} of them once more in part: their other pieces come in later steps")
    if len(too_long):
        lines.append(f"  {len(too_long):,} left out: a span in them is longer than the context")
    if lost := int((kept < slots).sum()):
        lines.append(f"  {lost:,} were met in steps that are not in the weights")
    return lines


def slots_read(steps: Sequence[ConsumedStep], number: int, source: TokenSource) -> np.ndarray:
    """int64 [documents]; slots of each document of source `number` that steps held."""
    read = np.zeros(source.num_documents, np.int64)
    for step in steps:
        own = step.plan.source == number
        np.add.at(read, step.plan.document[own], step.plan.slots[own])
    return read


def _document_lines(run: RunData, steps: Sequence[ConsumedStep], name: str) -> list[str]:
    """A line for each piece of the document "shard/key" that a step held."""
    found = [
        (number, document)
        for number, source in enumerate(run.stream.sources)
        for document in documents_of_name(source, name)
    ]
    if not found:
        raise ConfigError(
            f'--document "{name}": no such document; legal: SHARD/KEY, as in tokens-00000.tar/000017'
        )
    lines = [
        f"{name}: step {step.went.step}, sequence {step.first_sequence + sequence}, slots {start} ... "
        f"{start + slots - 1}{'' if step.went.is_kept else ', not in the weights'}"
        for step in steps
        for sequence, number, document, start, slots in pieces(step)
        if (number, document) in found
    ]
    return lines or [f"{name}: in no step"]


def pieces(step: ConsumedStep) -> Iterator[tuple[int, int, int, int, int]]:
    """(sequence of the step, source, document, first slot, slots) of each piece."""
    plan = step.plan
    sequence = np.repeat(np.arange(len(plan)), np.diff(plan.first))
    arrays = (sequence, plan.source, plan.document, plan.start, plan.slots)
    yield from zip(*(array.tolist() for array in arrays), strict=True)


def _write(path: Path, run: RunData, steps: Sequence[ConsumedStep]) -> None:
    """Write a line for each piece in each step."""
    names: dict[tuple[int, int], str] = {}
    with atomic_file(path) as file:
        for line in _csv_lines(run, steps, names):
            file.write(line)
    print(f"{path}: a line for each piece of a document in each step")


class _Lines(list[str]):
    """Lines that csv writes."""

    def write(self, text: str) -> None:
        self.append(text)


def _csv_lines(
    run: RunData, steps: Sequence[ConsumedStep], names: dict[tuple[int, int], str]
) -> Iterator[bytes]:
    lines = _Lines()
    writer = csv.writer(lines)
    writer.writerow(["step", "in_weights", "sequence", "source", "document", "first_slot", "slots"])
    for step in steps:
        for sequence, number, document, start, slots in pieces(step):
            source = run.stream.sources[number]
            name = names.setdefault((number, document), source.name(document))
            place = step.first_sequence + sequence
            kept = int(step.went.is_kept)
            writer.writerow([step.went.step, kept, place, source.folder, name, start, slots])
        yield "".join(lines).encode()
        lines.clear()


def _shared(runs: Sequence[RunData]) -> list[str]:
    """Lines on the documents that both of two runs read, one of them, or one more often."""
    counts = []
    for run in runs:
        steps = list(consumed_steps(run))
        counts.append(
            {
                source.index_hash: slots_read(steps, number, source)
                for number, source in enumerate(run.stream.sources)
            }
        )
    names = {source.index_hash: source.folder for run in runs for source in run.stream.sources}
    lines = []
    for index, folder in names.items():
        if any(index not in found for found in counts):
            one = runs[0 if index in counts[0] else 1].folder
            lines.append(f"{folder}: a source of {one} alone")
            continue
        ours, theirs = counts[0][index], counts[1][index]
        both, equal = int((np.minimum(ours, theirs) > 0).sum()), int(((ours == theirs) & (ours > 0)).sum())
        alone = [int((read > 0).sum()) - both for read in (ours, theirs)]
        lines.append(
            f"{folder}: {both:,} documents consumed by both, {equal:,} of them equally often; "
            f"{alone[0]:,} by {runs[0].folder} alone, {alone[1]:,} by {runs[1].folder} alone"
        )
    return lines
