"""Every file that Motley reads or writes: where it is in the arena, and the verbs that reach it.

The test of errors and the campaign draw from this one table. A new kind of file is a row.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class File:
    """One kind of file."""

    glob: str
    """In the arena."""
    verbs: tuple[str, ...]
    """Names of tests.faults.arena.VERBS."""
    flips: bool = True
    """Whether a changed digit must not pass unnoticed: not in what people write, and not in raw documents."""
    optional: bool = False
    """Whether the file may be absent: its absence says something else, and is no fault."""
    written: bool = False
    """Whether a verb of `verbs` writes it."""


RUN, STEP, COMPARISON = "runs/tiny", "runs/tiny/checkpoints/step_00000009", "runs/tiny_compare"
FILES = (
    File("run.toml", ("describe", "train"), flips=False),
    File("profile.toml", ("submit",), flips=False),
    File("data/train/manifest.json", ("train fresh", "train")),
    File("data/train/index.bin", ("train fresh", "train"), optional=True),
    File("data/train/*.tar", ("train fresh", "train")),
    File("data/heldout/manifest.json", ("train fresh",)),
    File("data/heldout/index.bin", ("train fresh",), optional=True),
    File("data/heldout/*.tar", ("train fresh",)),
    File(f"{RUN}/config.resolved.json", ("status", "train", "export"), written=True),
    File(f"{RUN}/record.json", ("status", "train"), optional=True, written=True),
    File(f"{RUN}/metrics.jsonl", ("status", "train"), written=True),
    File(f"{RUN}/tensorboard/events*", ("train",), optional=True, written=True),
    File(f"{RUN}/lock", ("status", "train"), optional=True, written=True),
    File(f"{STEP}/manifest.json", ("export", "train"), written=True),
    File(f"{STEP}/state.json", ("export", "train"), written=True),
    File(f"{STEP}/engine/*.safetensors", ("export", "train"), written=True),
    File(f"{STEP}/rng/*.pt", ("export", "train"), written=True),
    File(f"{RUN}/slurm/attempts.jsonl", ("status", "logs"), optional=True),
    File(f"{RUN}/slurm/1/job.json", ("status", "logs"), optional=True),
    File(f"{RUN}/slurm/1/config.json", ("status",), optional=True),
    File("compare.toml", ("status file", "report"), flips=False),
    File("base.toml", ("status file", "report"), flips=False),
    File(f"{COMPARISON}/comparison.json", ("status compare", "report", "compare"), written=True),
    File(f"{COMPARISON}/configs/*.json", ("compare",), optional=True),
    File(f"{COMPARISON}/*/config.resolved.json", ("status compare", "report")),
    File(f"{COMPARISON}/*/record.json", ("report", "status compare")),
    File(f"{COMPARISON}/*/metrics.jsonl", ("report", "status compare")),
    File(f"{COMPARISON}/*/documents.json", ("report",)),
    File("logs.csv", ("report logs",), flips=False),
    File(f"{COMPARISON}/report/summary.json", ("compare", "report"), written=True),
    File(f"{COMPARISON}/report/index.html", ("compare", "report"), optional=True, written=True),
    File(f"{COMPARISON}/report/*.csv", ("report",), optional=True, written=True),
    File("weights/model.json", ("train weights", "export weights")),
    File("weights/model.safetensors", ("train weights", "export weights")),
    File("data.toml", ("tokenize",), flips=False),
    File("raw/*.tar", ("tokenize",), flips=False, optional=True),
    File("tokenizers/*/settings.json", ("tokenize",)),
    File("tokenizers/*/codebook.np*", ("tokenize",)),
    File("tokenizers/image/pixels.json", ("tokenize",)),
    File("tokenizers/text/sentencepiece.model", ("tokenize",)),
)
