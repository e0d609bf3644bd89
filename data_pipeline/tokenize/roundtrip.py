"""What tokenizing keeps of the data: figures, and files of originals beside their decoded copies."""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import atomic_file
from data_pipeline.shards.tar import Location, Sample
from data_pipeline.tokenize.isolated import Refused, use_samples
from data_pipeline.tokenize.layout import SourceSettings
from data_pipeline.tokenize.limits import Limits, parts_within
from data_pipeline.tokenize.registry import KINDS
from data_pipeline.tokenize.sources import Split
from data_pipeline.tokenize.tokenizer import Medium, Tokenizer
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS, load_tokenizers
from data_pipeline.tokenize.workers import run_tasks

STEM = "roundtrip"


def figures_of(modality: str, measured: Mapping[str, float]) -> Mapping[str, float]:
    """Return the figures of one modality from the table "measured" of a manifest."""
    if modality in KINDS:
        return measured
    prefix = f"{modality}."
    return {key.removeprefix(prefix): value for key, value in measured.items() if key.startswith(prefix)}


def add_figures(modality: str, figures: Mapping[str, float], measured: "Counter[str]") -> None:
    """Add a modality's figures to those of a manifest.

    Figures of the modalities in the registry keep the bare names that manifests have always had, which no two
    of these modalities share; others are told apart by a prefix.
    """
    prefix = "" if modality in KINDS else f"{modality}."
    measured.update({f"{prefix}{name}": value for name, value in figures.items()})  # type: ignore[arg-type]


def show_roundtrip(
    splits: list[Split],
    tokenizers: Mapping[str, Tokenizer],
    out: Path,
    limits: Limits,
    source: SourceSettings,
) -> None:
    """Write the missing files of modalities whose medium can be shown: roundtrip.png (originals above their
    decoded copies), roundtrip.wav (in turn). `tokenizers`: those that OUT holds.
    """
    missing = {
        modality: (path, tokenizer.medium.show)
        for modality, tokenizer in tokenizers.items()
        if tokenizer.medium is not None
        and tokenizer.medium.show is not None
        and not (path := _path(out, modality, tokenizer.medium)).exists()
    }
    if not missing:
        return
    task = ContentsTask(splits[0].shards[0], out / TOKENIZERS, tuple(missing), limits, source)
    with run_tasks(first_contents, [task], 1) as results:
        (contents,) = results
    for modality, (path, show) in missing.items():
        tokenizer = tokenizers[modality]
        pairs = [(content, tokenizer.decode(tokenizer.encode(content))) for content in contents[modality]]
        if pairs:
            with atomic_file(path) as file:
                file.write(show(pairs))


def _path(out: Path, modality: str, medium: Medium) -> Path:
    return out / f"{STEM if modality in KINDS else f'{STEM}_{modality}'}.{medium.suffix}"


@dataclass(frozen=True)
class ContentsTask:
    """A shard whose first contents are asked for: those of modalities that have tokenizers in a folder."""

    shard: Location
    folder: Path
    modalities: tuple[str, ...]
    limits: Limits
    source: SourceSettings


def first_contents(task: ContentsTask) -> dict[str, list[Any]]:
    """Modality -> the first contents of a shard that can be encoded, as many as its medium shows. Runs in a
    worker.
    """
    tokenizers = load_tokenizers(task.folder)
    media = {name: tokenizers[name].medium for name in task.modalities}
    num_shown = {name: medium.num_shown for name, medium in media.items() if medium is not None}
    contents: dict[str, list[Any]] = {name: [] for name in num_shown}

    def read(key: str, sample: Sample) -> list[tuple[str, Any]]:
        """(modality, content) of each part."""
        found: list[tuple[str, Any]] = []
        for part in parts_within(sample, task.limits, key=key, source=task.source):
            if part.modality in num_shown:
                tokenizer = tokenizers[part.modality]
                content = tokenizer.read(part.data)
                tokenizer.encode(content)
                found.append((part.modality, content))
        return found

    with closing(use_samples([task.shard], read, task.limits, source=task.source)) as samples:
        for _, _, made in samples:
            for modality, content in () if isinstance(made, Refused) else made:
                if len(contents[modality]) < num_shown[modality]:
                    contents[modality].append(content)
            if all(len(listed) >= num_shown[modality] for modality, listed in contents.items()):
                break
    return contents


def summary(name: str, manifest: Mapping[str, Any], tokenizers: Mapping[str, Tokenizer]) -> str:
    """A few lines on a finished split: documents, tokens by modality, what the tokenizers keep of them."""
    tokens = manifest["tokens"]
    total = sum(tokens.values())
    lines = [
        f"{name or 'data'}: {manifest['num_documents']} documents, {manifest['num_skipped']} skipped, "
        f"{total} tokens: "
        + ", ".join(f"{modality} {count} ({count / max(1, total):.0%})" for modality, count in tokens.items())
    ]
    for modality, tokenizer in tokenizers.items():
        if tokenizer.medium is not None:
            line = tokenizer.medium.summary(figures_of(modality, manifest["measured"]))
            lines += [] if line is None else [f"  {modality}: {line}"]
    return "\n".join(lines)
