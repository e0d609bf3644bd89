"""Ways in which a file goes bad; each is a function of a path and a random generator."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np

from data_pipeline.shards.index import TokenSource
from tests.pretrain.tiny_data import document, write_tokens


def missing(path: Path, rng: Random) -> None:
    path.unlink()


def folder(path: Path, rng: Random) -> None:
    path.unlink()
    path.mkdir()


def garbage(path: Path, rng: Random) -> None:
    path.write_bytes(rng.randbytes(max(64, path.stat().st_size // 2)))


def json_list(path: Path, rng: Random) -> None:
    path.write_text("[]\n")


def half(path: Path, rng: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def cut(path: Path, rng: Random) -> None:
    """Anywhere but at its beginning or end."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(1, max(2, len(content) - 1))])


def flipped_bit(path: Path, rng: Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def changed_digit(path: Path, rng: Random) -> None:
    """Another digit, as an editor would leave it; a flipped bit in a file without digits."""
    content = bytearray(path.read_bytes())
    places = [match.start() for match in re.finditer(rb"[1-8]", content)]
    if not places:
        return flipped_bit(path, rng)
    content[rng.choice(places)] += 1
    path.write_bytes(content)


def zeroed_tail(path: Path, rng: Random) -> None:
    """Of the same length: what a disk that lost its newest blocks gives back."""
    content = path.read_bytes()
    kept = rng.randrange(len(content) // 2, len(content)) if content else 0
    path.write_bytes(content[:kept].ljust(len(content), b"\0"))


STRUCTURAL: dict[str, Callable[[Path, Random], None]] = {
    "missing": missing,
    "folder": folder,
    "garbage": garbage,
    "json list": json_list,
    "half": half,
    "cut": cut,
}
CONTENT: dict[str, Callable[[Path, Random], None]] = {
    "flipped bit": flipped_bit, "changed digit": changed_digit, "zeroed tail": zeroed_tail,
}  # fmt: skip


def foreign(path: Path, root: Path, rng: Random) -> str | None:
    """Replace a file, or a run's whole checkpoint, by that of another run of the same model; returns what was
    taken, None if there is no such file."""
    below = path.relative_to(root).parts
    if below[:2] == ("runs", "tiny") and "checkpoints" not in below:
        other = root.joinpath("runs", "tiny_compare", "mot_seed4", *below[2:])
    elif below[:2] == ("runs", "tiny"):
        return foreign_checkpoint(root)
    elif below[:2] == ("runs", "tiny_compare") and len(below) == 4 and "_seed" in below[2]:
        arm, _, seed = below[2].partition("_seed")
        other = path.parents[1] / f"{arm}_seed{7 - int(seed)}" / path.name
    elif below[:2] in (("data", "train"), ("data", "heldout")):
        other = root / "data" / {"train": "heldout", "heldout": "train"}[below[1]] / below[2]
    else:
        return None
    if not other.is_file():
        return None
    shutil.copyfile(other, path)
    return str(other.relative_to(root))


def foreign_checkpoint(root: Path) -> str:
    """Put the checkpoint of a run with another seed where the run's newest stands."""
    newest = root / "runs/tiny/checkpoints/step_00000009"
    shutil.rmtree(newest)
    other = root / "runs/tiny_compare/mot_seed4/checkpoints/step_00000009"
    shutil.copytree(other, newest)
    return str(other.relative_to(root))


def flipped_documents(folder: Path, count: int, rng: Random) -> None:
    """Flip a bit in the ids of `count` documents of a folder of token shards; the index stays as it was."""
    source = TokenSource.open(folder)
    for number in rng.sample(range(source.num_documents), count):
        path = folder / source.name(number).partition("/")[0]
        content = bytearray(path.read_bytes())
        size = int(source.lengths[number]) * source.vocabulary.dtype.itemsize
        content[int(source.index.offset[number]) + rng.randrange(size)] ^= 1
        path.write_bytes(content)


def other_documents(folder: Path, rng: Random) -> None:
    """As many documents as before, of another seed, with a manifest of their own."""
    count = TokenSource.open(folder).num_documents
    shutil.rmtree(folder)
    generator = np.random.default_rng(rng.randrange(3, 1 << 30))
    write_tokens(folder, [document(generator) for _ in range(count)])
