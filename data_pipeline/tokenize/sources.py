"""Finds raw shards: the splits of a folder, or the URLs of a pattern."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import is_remote


@dataclass(frozen=True)
class Split:
    """Raw shards that become one folder of token shards; `name` is "" where SRC itself holds them."""

    name: str
    folder: str
    listing: tuple[tuple[str, int], ...]
    """(name, bytes) of each shard, sorted by name; -1 bytes for a remote shard."""

    @property
    def urls(self) -> list[str]:
        """URLs of remote shards, and absolute paths of local ones: no file name then looks like a scheme
        such as `pipe:`, which would run a command (data_pipeline/shards/tar.py: is_remote)."""
        if not self.folder:
            return [name for name, _ in self.listing]
        return [str(Path(self.folder).absolute() / name) for name, _ in self.listing]


def find_splits(src: str) -> list[Split]:
    """The splits of SRC: one split for every sub-folder that holds tars, or one for SRC itself, which may be
    a URL such as "https://host/train-{00000..00099}.tar". Raises ConfigError where SRC holds no shards.
    """
    if is_remote(src):
        from braceexpand import braceexpand  # comes with webdataset

        return [Split("", "", tuple((url, -1) for url in braceexpand(src)))]
    root = Path(src)
    if not root.exists():
        raise ConfigError(f"{src}: no such folder")
    if not root.is_dir():
        raise ConfigError(f"{src}: not a folder; give the folder that holds the raw shards (*.tar)")
    own = _tars(root)
    nested = {child.name: _tars(child) for child in sorted(root.iterdir()) if child.is_dir()}
    nested = {name: tars for name, tars in nested.items() if tars}
    if own and nested:
        raise ConfigError(
            f"{src}: holds shards itself and in {', '.join(nested)}; move them so that it is one or the other"
        )
    if own:
        return [Split("", src, own)]
    if nested:
        return [Split(name, str(root / name), tars) for name, tars in nested.items()]
    names = sorted(child.name + "/" * child.is_dir() for child in root.iterdir())[:8]
    raise ConfigError(
        f"{src}: no *.tar in it nor in its sub-folders; it holds {', '.join(names) or 'nothing'}. Raw data "
        "is WebDataset shards as described in data_pipeline/tokenize/raw.py; `motley demo-corpus` writes some"
    )


def _tars(folder: Path) -> tuple[tuple[str, int], ...]:
    return tuple((path.name, path.stat().st_size) for path in sorted(folder.glob("*.tar")))
