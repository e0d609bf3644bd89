"""Finds raw shards: the splits of a folder, or the URLs of a pattern."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.printable import printable
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Location, Url, check_file_name, typed_location


@dataclass(frozen=True)
class Split:
    """Raw shards that become one folder of token shards; `name` is "" where SRC itself holds them."""

    name: str
    folder: Path | None
    """None: the shards are Urls."""
    listing: tuple[tuple[str, int], ...]
    """(name, bytes) of each shard, sorted by name; -1 bytes for a Url."""

    @property
    def shards(self) -> list[Location]:
        """The property lists where the shards are, in order."""
        if self.folder is None:
            return [Url(name) for name, _ in self.listing]
        return [self.folder / name for name, _ in self.listing]


def find_splits(src: str) -> list[Split]:
    """The splits of SRC, as a person typed it: one split for every sub-folder that holds tars, or one for SRC
    itself, which may be a URL such as "https://host/train-{00000..00099}.tar".

    Raises ConfigError where SRC holds no shards, or a file or folder whose name cannot be shown.
    """
    location = typed_location(src)
    if isinstance(location, Url):
        from braceexpand import braceexpand  # comes with webdataset

        return [Split("", None, tuple((url, -1) for url in braceexpand(location.text)))]
    root = location.absolute()
    if not root.exists():
        raise ConfigError(f"{src}: no such folder")
    if not root.is_dir():
        raise ConfigError(f"{src}: not a folder; give the folder that holds the raw shards (*.tar)")
    own = _tars(root)
    nested = {child.name: _tars(child) for child in sorted(root.iterdir()) if child.is_dir()}
    nested = {name: tars for name, tars in nested.items() if tars}
    for name in nested:
        check_file_name(name, f"{src}: folder")
    if own and nested:
        raise ConfigError(
            f"{src}: holds shards itself and in {', '.join(nested)}; move them so that it is one or the other"
        )
    if own:
        return [Split("", root, own)]
    if nested:
        return [Split(name, root / name, tars) for name, tars in nested.items()]
    names = sorted(printable(child.name) + "/" * child.is_dir() for child in root.iterdir())[:8]
    raise ConfigError(
        f"{src}: no *.tar in it nor in its sub-folders; it holds {', '.join(names) or 'nothing'}. Raw data "
        "is WebDataset shards as described in data_pipeline/tokenize/raw.py; `motley demo-corpus` writes some"
    )


def _tars(folder: Path) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of the tars in a folder. Raises ConfigError for one that is no regular file."""
    paths = sorted(folder.glob("*.tar"))
    for path in paths:
        check_file_name(path.name, f"{folder}: shard")
        if not path.is_file():
            raise ConfigError(f"{path}: not a regular file; take it away, or give it another name")
    return tuple((path.name, path.stat().st_size) for path in paths)


def commands_of(splits: list[Split]) -> list[str]:
    """The shell commands that reading the splits runs: those behind a `pipe:` that a person typed."""
    urls = [shard.text for split in splits for shard in split.shards if isinstance(shard, Url)]
    return [url.removeprefix("pipe:") for url in urls if url.startswith("pipe:")]
