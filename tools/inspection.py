"""`motley inspect`: tables on the terminal, and a picture where depth is routed."""

from pathlib import Path

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from pretrain.evaluation.selection_picture import IMAGE, image_tokenizer
from tools.selected_tokens import Inspection, inspect
from tools.selection_figure import selection_png


def show(run: Path, out: Path | None, *, documents: int, causal: bool) -> None:
    """Print what `run`'s routers choose; write it over the images of so many documents to `out`, None: into
    the run directory. Raises ConfigError."""
    if documents < 0:
        raise ConfigError(f"--documents {documents}: 0 or more")
    found = inspect(run, documents=documents, causal=causal)
    print(tables(found), flush=True)
    if not found.depth:
        print("no picture: the model has no depth routing")
        return
    if out is None:
        out = found.checkpoint.parents[1] / f"selected_tokens_step_{found.step:08d}.png"
    try:
        with atomic_file(out) as file:
            file.write(selection_png(found))
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error}") from None
    print(f"{out}: {_told(found, documents)}")


def _told(found: Inspection, documents: int) -> str:
    if found.images is not None:
        told = f"{len(found.images.texts)} images of held-out documents"
        tokenizer = image_tokenizer(found.images.source)
        return f"{told}, not decoded: {tokenizer}" if isinstance(tokenizer, str) else told
    if IMAGE not in found.config.model.depth:
        return "ratios alone: the model routes no images"
    return f"ratios alone: {'no image among those documents' if documents else '--documents 0'}"


def tables(found: Inspection) -> str:
    """A line for each router of depth, then one for the experts of each layer and tower."""
    lines = [f"{found.checkpoint}: {found.tokens:,} held-out tokens, chosen by {found.by}"]
    if found.depth:
        lines += ["", "layer  modality  scheduled  realised  gate mean  gate spread"]
        lines += [
            f"{r.layer:5}  {r.modality:8}  {r.scheduled:9.3f}  {r.realised:8.3f}  {r.gate_mean:9.4f}  "
            f"{r.gate_std:11.4f}"
            for r in found.depth
        ]
    if found.experts:
        lines += ["", "layer  tower     dropped  share of tokens per expert"]
        lines += [
            f"{r.layer:5}  {r.tower:8}  {r.dropped:7.3f}  {' '.join(f'{share:.3f}' for share in r.shares)}"
            for r in found.experts
        ]
    return "\n".join(lines)
