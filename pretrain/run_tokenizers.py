"""The tokenizers that made the data of a run. This module imports no torch."""

from pathlib import Path

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import ShardError, typed_location
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS, load_tokenizers
from pretrain.config import RunConfig
from pretrain.data_manifest import data_manifest, data_name


def tokenizers_of_run(path: Path, config: RunConfig, folder: Path | None) -> dict[str, Tokenizer]:
    """The tokenizers in `folder`, or beside the data of a run; the same that made the data, where that is
    there."""
    data = typed_location(config.data.train[0].path)
    beside = [data / TOKENIZERS, data.parent / TOKENIZERS] if isinstance(data, Path) else []
    places = [folder] if folder else beside
    if not places:
        raise ConfigError(
            f"{path}: its data is behind a URL, so no tokenizers lie beside it, and ids cannot become text, "
            "pictures or sound; copy the folder that `motley tokenize` wrote to this machine, and name it "
            "with --tokenizers DIR. While a run trains, every_steps.samples and evaluate.generate need a "
            "folder"
        )
    found = next((place for place in places if (place / TEXT).is_dir()), None)
    if found is None:
        raise ConfigError(
            f"{path}: no tokenizers in {' or '.join(map(str, places))}, so ids cannot become text, pictures "
            "or sound; name the folder that `motley tokenize` wrote with --tokenizers DIR"
        )
    tokenizers = load_tokenizers(found)
    try:
        made_by = data_manifest(config)["tokenizers"]
    except ShardError:  # the data is gone; sizes are compared by the caller
        return tokenizers
    for modality, entry in made_by.items():
        own = tokenizers[modality].fingerprint if modality in tokenizers else "missing"
        if own != entry["fingerprint"]:
            raise ConfigError(
                f"{found / modality}: fingerprint {own}, but {data_name(config)} was made by "
                f"{entry['fingerprint']}: not the tokenizer that "
                "the model was trained with; name the folder of that with --tokenizers DIR"
            )
    return tokenizers
