"""Samples of several runs behind the same held-out prompts: one offline page, and a sheet of their pictures.

python -m tools.side_by_side runs/untying/dense_seed1 runs/untying/mot_seed1 --out samples
"""

import argparse
import io
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from data_pipeline.files.atomic import atomic_file, atomic_folder
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vocabulary import TEXT
from parallel.exit_codes import ExitCode
from pretrain.generation.continuation import continue_prompts
from pretrain.generation.page import ShownPrompt, page
from pretrain.generation.pieces import Piece, decode
from pretrain.generation.prompts import Prompt, part_prompts
from pretrain.generation.sampling import Sampling
from pretrain.generation.trained_model import TrainedModel, open_model

IMAGE = "image"
PAGE, SHEET = "index.html", "pictures.png"
MOST_TOKENS = 192
"""Ids of a sample at most, where its modality has no fixed number."""
SIDE_PX, GAP_PX, LABEL_PX, LINE_CHARACTERS = 128, 12, 16, 110
"""Of the sheet: side of a picture, space between pictures, height of a line of text, and its length."""


class Sampled(NamedTuple):
    """A prompt and what every run makes of it."""

    direction: tuple[str, str]
    """Modality of the prompt, modality of the samples."""
    prompt: Prompt
    samples: Sequence[Sequence[Piece]]
    """A sample of each run, in their order."""


def write_page(paths: Sequence[Path], out: Path, *, pictures: int, others: int, sampling: Sampling) -> None:
    """Write `out`, whole or not at all: the page and the sheet. Raises ConfigError.

    Every modality follows text, and text follows every modality: `pictures` pictures, `others` of the rest.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose another folder, or remove it")
    models = [open_model(path) for path in paths]
    first = models[0]
    for path, model in zip(paths, models, strict=True):
        if model.heldout is None or model.heldout != first.heldout:
            raise ConfigError(
                f"{path}: its held-out data is {model.heldout}, not {first.heldout} as of {paths[0]}"
            )
    assert first.heldout is not None
    source, found = TokenSource.open(first.heldout), []
    for modality in first.vocabulary.modalities[1:]:
        count = pictures if modality == IMAGE else others
        found += _sampled(models, source, (TEXT, modality), count, sampling)
        found += _sampled(models, source, (modality, TEXT), others, sampling)
    names = [model.source.name for model in models]
    about = [f"The same held-out prompts for all; temperature {sampling.temperature:g}, seed {sampling.seed}"]
    shown = [
        ShownPrompt(
            f"{each.direction[0]} to {each.direction[1]}, {each.prompt.name}",
            prompt,
            truth,
            each.samples,
            names,
        )
        for each in found
        for prompt, truth in [_decoded(first, each.prompt)]
    ]
    with atomic_folder(out) as writing:
        with atomic_file(writing / PAGE) as file:
            file.write(page(f"Samples of {' and '.join(names)}", about, shown).encode())
        with atomic_file(writing / SHEET) as file:
            file.write(sheet(first, [each for each in found if each.direction[1] == IMAGE], names))


def _sampled(
    models: Sequence[TrainedModel], source: TokenSource, direction: tuple[str, str], count: int, how: Sampling
) -> list[Sampled]:
    """Samples of all models behind the first parts of a modality that stand beside one of the other."""
    first = models[0]
    grammar = first.grammar(direction[1])
    context, least = first.decoder.config.context_tokens, grammar.least_room()
    found = part_prompts(source, count, context).get(direction, ())
    prompts = [prompt for prompt in found if len(prompt.ids) + least <= context + 1]
    if not prompts:
        return []
    of_models = []
    for model in models:
        samples = continue_prompts(
            model.decoder, [prompt.document for prompt in prompts], grammar, how, model.routing_state,
            samples=1, max_tokens=max(MOST_TOKENS, least),
        )  # fmt: skip
        of_models.append([decode(each, model.vocabulary, model.tokenizers) for (each,) in samples])
    return [Sampled(direction, prompt, samples) for prompt, *samples in zip(prompts, *of_models, strict=True)]


def _decoded(model: TrainedModel, prompt: Prompt) -> tuple[list[Piece], list[Piece]]:
    """(prompt, truth) as pieces."""
    assert prompt.truth is not None
    both = (prompt.document, prompt.truth)
    first, second = (decode(each, model.vocabulary, model.tokenizers) for each in both)
    return first, second


def sheet(model: TrainedModel, found: Sequence[Sampled], names: Sequence[str]) -> bytes:
    """A PNG file: for every prompt its text, and below it the true picture and that of every run."""
    columns = ["truth", *names]
    row_px = 2 * LABEL_PX + SIDE_PX + GAP_PX
    width = max(len(columns) * (SIDE_PX + GAP_PX), LINE_CHARACTERS * 7)
    canvas = Image.new("RGB", (width, LABEL_PX + row_px * len(found)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LABEL_PX - 4)
    for column, name in enumerate(columns):
        draw.text((column * (SIDE_PX + GAP_PX), 0), name, "black", font)
    for row, each in enumerate(found):
        prompt, truth = _decoded(model, each.prompt)
        text = " ".join(" ".join(p.text.split()) if p.modality == TEXT else f"[{p.modality}]" for p in prompt)
        top = LABEL_PX + row * row_px
        for line, part in enumerate(textwrap.wrap(text, LINE_CHARACTERS)[:2]):
            draw.text((0, top + line * LABEL_PX), part, "black", font)
        for column, pieces in enumerate([truth, *each.samples]):
            picture = Image.open(io.BytesIO(next(piece.file for piece in pieces if piece.suffix == "png")))
            large = picture.resize((SIDE_PX, SIDE_PX), Image.Resampling.NEAREST)
            canvas.paste(large, (column * (SIDE_PX + GAP_PX), top + 2 * LABEL_PX))
    written = io.BytesIO()
    canvas.save(written, "PNG", optimize=True)
    return written.getvalue()


def main(argv: Sequence[str]) -> int:
    """Parse arguments and write the folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.side_by_side", description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, help="run directories or checkpoints, over the same data"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--pictures", type=int, default=6, help="prompts of pictures (default %(default)s)")
    parser.add_argument(
        "--others", type=int, default=2, help="prompts of each other kind (default %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        sampling = Sampling(temperature=args.temperature, seed=args.seed)
        write_page(args.runs, args.out, pictures=args.pictures, others=args.others, sampling=sampling)
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return ExitCode.USER_ERROR
    print(args.out / PAGE)
    return ExitCode.DONE


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
