"""The demo corpus: pictures of scanned digits, sentences about them, the sentences spoken, and library text.

The corpus is written as raw WebDataset shards in the form of `data_pipeline.tokenize.raw`, into OUT/train and
OUT/heldout, whose scans and library texts are disjoint. A shard is a pure function of (seed, split, its
number), made in a process of its own, so the bytes depend neither on the number of processes nor on whether a
run was interrupted.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from data_pipeline.demo.library_text import Passage, library_passages
from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import write_shard
from data_pipeline.tokenize.claim import claimed
from data_pipeline.tokenize.raw import Part, document_sample
from data_pipeline.tokenize.workers import default_processes, run_tasks

SPLITS = ("train", "heldout")
HELDOUT_FRAC = 0.05
SHARD_DOCUMENTS = 500
LIBRARY_FRAC = 0.2
"""Share of documents that are library text, as far as there is enough of it (no passage occurs twice)."""
PART_SETS = {
    ("text", "image", "speech"): 4,
    ("text", "image"): 3,
    ("text", "speech"): 2,
    ("image", "speech"): 1,
}
"""Modalities of a document about a scene -> weight with which they are drawn."""
RECORD = "corpus.json"
_SUFFIXES = {"image": "png", "speech": "wav"}


@dataclass(frozen=True)
class CorpusShardTask:
    """Everything that the bytes of a shard depend on."""

    path: Path
    split: str
    seed: int
    first_document: int
    num_documents: int
    passages: dict[int, str]
    """Document -> library text; the other documents are about a scene."""


def write_demo_corpus(
    out: str | Path, *, num_documents: int, seed: int = 1, processes: int | None = None
) -> dict[str, Any]:
    """Write the corpus, or its missing shards, and return its record.

    Raises ConfigError if speech cannot be made, or if OUT holds anything but this corpus.
    """
    if num_documents < 20:
        raise ConfigError(f"--documents {num_documents}: at least 20, so that one can be held out")
    out = Path(out)
    record = corpus_record(num_documents, seed)
    with claimed(out, RECORD, record, "demo corpus"):
        if all(path.exists() for _, path, _, _ in shard_ranges(out, num_documents)):
            return record  # Reading the library's passages takes seconds, and they are not needed.
        for split in SPLITS:
            (out / split).mkdir(exist_ok=True)
        missing = [task for task in plan_shards(out, num_documents, seed) if not task.path.exists()]
        done = num_documents - sum(task.num_documents for task in missing)
        processes = default_processes() if processes is None else processes
        with (
            run_tasks(
                write_task, missing, processes, preload=_IMPORTS, fresh_process_per_task=True
            ) as counts,
            Progress("demo corpus", num_documents, "documents", done=done) as progress,
        ):
            for count in counts:
                progress.advance(count)
    return record


_IMPORTS = ("data_pipeline.demo.scenes", "data_pipeline.demo.voices", "sklearn.datasets", "scipy.signal")


def corpus_record(num_documents: int, seed: int) -> dict[str, Any]:
    """The record of a corpus: what its bytes depend on, and where its content comes from."""
    from data_pipeline.demo.voices import Speaker

    return {
        "documents": num_documents,
        "seed": seed,
        "content": "pictures composed of scanned handwritten digits (scikit-learn), synthetic speech "
        "(espeak-ng), documentation of the Python standard library",
        "python": sys.version.split()[0],
        "espeak_ng": Speaker().version,
        "packages": {name: version(name) for name in ("scikit-learn", "pillow", "scipy", "numpy")},
    }


def plan_shards(out: Path, num_documents: int, seed: int) -> list[CorpusShardTask]:
    """The shards of both splits. Pure but for reading this Python's documentation."""
    passages, counts = library_passages(), _split_counts(num_documents)
    placed = {split: _place_passages(passages, split, counts[split], seed) for split in SPLITS}
    tasks = []
    for split, path, first, size in shard_ranges(out, num_documents):
        own = {index: placed[split][index] for index in range(first, first + size) if index in placed[split]}
        tasks.append(CorpusShardTask(path, split, seed, first, size, own))
    return tasks


def shard_ranges(out: Path, num_documents: int) -> list[tuple[str, Path, int, int]]:
    """(split, path, first document, number of documents) of each shard."""
    return [
        (split, out / split / f"{split}-{number:05d}.tar", first, min(SHARD_DOCUMENTS, count - first))
        for split, count in _split_counts(num_documents).items()
        for number, first in enumerate(range(0, count, SHARD_DOCUMENTS))
    ]


def _split_counts(num_documents: int) -> dict[str, int]:
    num_heldout = max(1, round(num_documents * HELDOUT_FRAC))
    return {"train": num_documents - num_heldout, "heldout": num_heldout}


def _place_passages(passages: Sequence[Passage], split: str, count: int, seed: int) -> dict[int, str]:
    """Documents of a split that are library text."""
    random = Random(f"{seed}/{split}/passages")
    own = [passage.text for passage in passages if passage.heldout == (split == "heldout")]
    chosen = random.sample(own, min(len(own), round(count * LIBRARY_FRAC)))
    return dict(zip(random.sample(range(count), len(chosen)), chosen, strict=True))


def write_task(task: CorpusShardTask) -> int:
    """Write one shard, in a fresh process (see demo.voices). Returns its number of documents."""
    from data_pipeline.demo.scenes import split_scans
    from data_pipeline.demo.voices import Speaker

    speaker = Speaker()
    scans = split_scans(heldout=task.split == "heldout")

    def samples():
        for index in range(task.first_document, task.first_document + task.num_documents):
            random = Random(f"{task.seed}/{task.split}/{index}")
            if index in task.passages:
                parts = [Part("text", task.passages[index])]
            else:
                parts = scene_document(random, scans, speaker)
            yield f"{index:08d}", document_sample(parts, _SUFFIXES)

    write_shard(task.path, samples())
    return task.num_documents


def scene_document(random: Random, scans: list[list[int]], speaker: Any) -> list[Part]:
    """Two or three parts about one scene, in random order.

    Speech speaks the sentence. Text is the same sentence beside speech alone; beside a picture it is the
    caption, and beside both it is the caption and the sentence.
    """
    from data_pipeline.demo.scenes import draw_scene, png, render
    from data_pipeline.demo.sentences import caption, sentence
    from data_pipeline.demo.voices import draw_voice, wav

    modalities = random.choices(tuple(PART_SETS), weights=tuple(PART_SETS.values()))[0]
    scene = draw_scene(random, scans)
    described = caption(random, scene)
    written, spoken = sentence(random, scene)
    voice = draw_voice(random)
    parts = []
    for modality in random.sample(modalities, len(modalities)):
        if modality == "image":
            parts.append(Part(modality, png(render(scene))))
        elif modality == "speech":
            parts.append(Part(modality, wav(speaker.say(spoken, voice))))
        elif "speech" not in modalities:
            parts.append(Part(modality, described))
        elif "image" not in modalities:
            parts.append(Part(modality, written))
        else:
            parts.append(Part(modality, f"{described}\n{written}"))
    return parts
