"""The tokenizers that made the data of a run. This module imports no torch."""

from pathlib import Path

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards import tar
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS, load_tokenizers
from pretrain.config import RunConfig


def tokenizers_of_run(path: Path, config: RunConfig, folder: Path | None) -> dict[str, Tokenizer]:
    """The tokenizers in `folder`, or beside the data of a run; the same that made the data, where that is
    there."""
    data = Path(config.data.train[0].path)
    places = [folder] if folder else [data / TOKENIZERS, data.parent / TOKENIZERS]
    found = next((place for place in places if (place / TEXT).is_dir()), None)
    if found is None:
        raise ConfigError(
            f"{path}: no tokenizers in {' or '.join(map(str, places))}, so ids cannot become text, pictures "
            "or sound; name the folder that `motley tokenize` wrote with --tokenizers DIR"
        )
    tokenizers = load_tokenizers(found)
    try:
        made_by = tar.read_manifest(data)["tokenizers"]
    except tar.ShardError:  # the data is gone; sizes are compared by the caller
        return tokenizers
    for modality, entry in made_by.items():
        own = tokenizers[modality].fingerprint if modality in tokenizers else "missing"
        if own != entry["fingerprint"]:
            raise ConfigError(
                f"{found / modality}: fingerprint {own}, but {data} was made by {entry['fingerprint']}: not "
                "the tokenizer that the model was trained with; name the folder of that with --tokenizers DIR"
            )
    return tokenizers
