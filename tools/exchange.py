"""`motley export` and `motley import`, in one process, without GPU or network.

Tensors are read when they are written, one by one, so memory holds only one file of the result at a time.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import load
from pretrain.data_manifest import data_name
from pretrain.run_files import CONFIG as RUN
from pretrain.weights.folder import (
    MODEL,
    Dtype,
    WeightSource,
    about_model,
    check_out,
    lacks_thresholds,
    write_folder,
)
from pretrain.weights.hugging_face import CONFIG, to_hugging_face
from pretrain.weights.sources import manifest_of, open_source, run_of, with_ids_of
from pretrain.weights.text_tokenizer import checked_ids, exported_files
from pretrain.weights.warm_start import adapt_weights

GB = 10**9
_TORCH_NAMES: dict[Dtype, str] = {"fp32": "float32", "bf16": "bfloat16"}


def export(
    source: Path,
    out: Path,
    *,
    layout: Literal["motley", "llama"],
    dtype: Dtype,
    file_gb: float,
    ema: bool = False,
    tokenizers: Path | None = None,
) -> None:
    """Write weights of a run, a checkpoint or a folder of weights as a new folder.

    `layout`: "motley", or "llama" for the layout of Hugging Face, which the text tokenizer belongs to. `ema`:
    the moving averages of the weights, which runs with optimizer.ema_decay have. `tokenizers`: their folder;
    None: beside the data of the run. Raises ConfigError, and then leaves OUT as it was.
    """
    check_out(out, source)
    weights = open_source(source, ema=ema)
    description: Mapping[str, object] = {MODEL: about_model(weights)}
    if layout == "llama":
        weights, config = to_hugging_face(weights)
        files = _tokenizer_files(weights, source, tokenizers)
        description = {CONFIG: config | {"torch_dtype": _TORCH_NAMES[dtype]}, **files}
    _write(out, weights, description, dtype, file_gb)


def _tokenizer_files(weights: WeightSource, source: Path, folder: Path | None) -> Mapping[str, object]:
    """The files of the text tokenizer. Where nobody named a folder and there is none, a line says why."""
    run = run_of(source)
    try:
        return exported_files(weights, None if run is None else load(run / RUN), folder)
    except ConfigError as error:
        if folder is not None:
            raise
        print(f"no tokenizer is written: {error}")
        return {}


def import_weights(
    run: Path,
    source: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    new_towers: Mapping[str, str],
    dtype: Dtype,
    file_gb: float,
    tokenizer: Path | None = None,
    unchecked_ids: bool = False,
) -> None:
    """Write weights for the model of RUN.toml, adapted from any weights that `open_source` reads.

    `new_towers`: see `pretrain.weights.warm_start.adapt_weights`. `tokenizer`: file or folder of the text
    tokenizer of weights of Hugging Face; None: in their folder. `unchecked_ids`: ids are not compared with
    those of the data. Raises ConfigError, and then leaves OUT as it was.
    """
    check_out(out, source)
    config = load(run, overrides)
    old, manifest = open_source(source), manifest_of(config)
    if not unchecked_ids:
        old = checked_ids(old, data_name(config), manifest, tokenizer)
    vocabulary = None if manifest is None else manifest["vocabulary"]
    weights = adapt_weights(old, config.model, seed=config.seed, new_towers=new_towers, vocabulary=vocabulary)
    weights = with_ids_of(weights, manifest)
    _write(out, weights, {MODEL: about_model(weights)}, dtype, file_gb)
    if old.vocabulary is None or vocabulary is None:
        unknown = source if old.vocabulary is None else data_name(config)
        print(f"ids keep their rows unchecked: the vocabulary of {unknown} is not known here")
    print(f'the run starts from them with initial_weights = "{out}"')


def _write(
    out: Path, weights: WeightSource, description: Mapping[str, object], dtype: Dtype, file_gb: float
) -> None:
    if not 0 < file_gb < math.inf:
        raise ConfigError(f"--file-gb {file_gb}: more than 0, and finite")
    files = write_folder(out, weights, description, dtype=dtype, file_bytes=int(file_gb * GB))
    size = sum(file.stat().st_size for file in files) / GB
    step = "" if weights.step is None else f", step {weights.step}"
    print(f"{out}: {len(weights.tensors)} tensors of {weights.name}{step}, {dtype}, {size:.3f} GB")
    if lacks_thresholds(weights):
        print(f"{out}: no thresholds of routers, which {weights.path} does not hold; generating needs them")
