"""`motley inspect`: it prints tables of what routers choose, and draws a picture for depth routing."""

from pathlib import Path

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from pretrain.evaluation.selection_picture import IMAGE, image_tokenizer
from tools.selected_tokens import Inspection, inspect
from tools.selection_figure import selection_png


def show(run: Path, out: Path | None, *, documents: int, causal: bool) -> None:
    """Print what the routers of a run choose, and write a picture of it to `out`. Raises ConfigError.

    `out`: None stands for a file in the run directory. `documents`: number of documents whose images are
    drawn.
    """
    if documents < 0:
        raise ConfigError(f"--documents {documents}: 0 or more")
    inspection = inspect(run, documents=documents, causal=causal)
    print(tables(inspection), flush=True)
    if not inspection.depth:
        print("no picture: the model has no depth routing")
        return
    if out is None:
        out = inspection.checkpoint.parents[1] / f"selected_tokens_step_{inspection.step:08d}.png"
    try:
        with atomic_file(out) as file:
            file.write(selection_png(inspection))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    print(f"{out}: {_summary(inspection, documents)}")


def _summary(inspection: Inspection, documents: int) -> str:
    """A few words about the content of the picture."""
    if inspection.images is not None:
        content = f"{len(inspection.images.texts)} images of held-out documents"
        tokenizer = image_tokenizer(inspection.images.source)
        return f"{content}, not decoded: {tokenizer}" if isinstance(tokenizer, str) else content
    if IMAGE not in inspection.config.model.depth:
        return "ratios alone: the model routes no images"
    return f"ratios alone: {'no image among those documents' if documents else '--documents 0'}"


def tables(inspection: Inspection) -> str:
    """The tables as text: a line per depth router, then a line per layer and tower with experts."""
    lines = [f"{inspection.checkpoint}: {inspection.tokens:,} held-out tokens, chosen by {inspection.by}"]
    if inspection.depth:
        lines += ["", "layer  modality  scheduled  realised  gate mean  gate spread"]
        lines += [
            f"{r.layer:5}  {r.modality:8}  {r.scheduled:9.3f}  {r.realised:8.3f}  {r.gate_mean:9.4f}  "
            f"{r.gate_std:11.4f}"
            for r in inspection.depth
        ]
    if inspection.experts:
        lines += ["", "layer  tower     dropped  share of tokens per expert"]
        lines += [
            f"{r.layer:5}  {r.tower:8}  {r.dropped:7.3f}  {' '.join(f'{share:.3f}' for share in r.shares)}"
            for r in inspection.experts
        ]
    return "\n".join(lines)
