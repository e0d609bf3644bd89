"""Finds raw shards: the splits of a folder, or the URLs of a pattern."""

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipeline.files.printable import printable
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Location, Url, check_file_name, typed_location
from data_pipeline.tokenize.readers import KINDS_OF_FILES, kind_of


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


def find_splits(src: str, files: str = "") -> list[Split]:
    """The splits of SRC, as a person typed it: one for every sub-folder that holds raw shards, or one for SRC
    itself, which may be a folder, a file, or a pattern of files or URLs such as "raw/train-{00..99}.tar".

    Raw shards of a folder are those whose names match `files`, or those of the first kind that is there
    (readers.py). Raises ConfigError where SRC holds none, or a file or folder whose name cannot be shown.
    """
    from braceexpand import braceexpand  # comes with webdataset

    location = typed_location(src)
    try:
        expanded = list(braceexpand(str(location)))
    except ValueError:  # braces without their other half
        expanded = [str(location)]
    if isinstance(location, Url):
        return [Split("", None, tuple((url, -1) for url in expanded))]
    root = location.absolute()
    if not root.exists() and expanded != [str(location)]:
        return [_files(src, [Path(path).absolute() for path in expanded])]
    if not root.exists():
        raise ConfigError(f"{src}: no such folder or file")
    if not root.is_dir():
        return [_files(src, [root])]
    return _folder_splits(src, root, files)


def _folder_splits(src: str, root: Path, files: str) -> list[Split]:
    """The splits of a folder: itself, or its sub-folders."""
    children = [child for child in sorted(root.iterdir()) if child.is_dir()]
    for endings in [tuple()] if files else [endings for _, endings in KINDS_OF_FILES]:
        own = _shards(root, files, endings)
        nested = {child.name: found for child in children if (found := _shards(child, files, endings))}
        for name in nested:
            check_file_name(name, f"{src}: folder")
        if own and nested:
            raise ConfigError(
                f"{src}: holds shards itself and in {', '.join(nested)}; move them so that it "
                "is one or the other"
            )
        if own:
            return [Split("", root, own)]
        if nested:
            return [Split(name, root / name, found) for name, found in nested.items()]
    names = sorted(printable(child.name) + "/" * child.is_dir() for child in root.iterdir())[:8]
    raise ConfigError(
        f"{src}: no {files or f'file of {_LEGAL}'} in it nor in its sub-folders; it holds "
        f"{', '.join(names) or 'nothing'}. docs/data.md says which layouts can be read; `motley demo-corpus` "
        "writes raw data"
    )


_LEGAL = ", ".join(f"*{ending}" for _, endings in KINDS_OF_FILES for ending in endings)


def _files(src: str, paths: list[Path]) -> Split:
    """A split of single files. Raises ConfigError for one that is none, or no raw shard by its ending."""
    root = Path(os.path.commonpath([path.parent for path in paths]))
    for path in paths:
        if not path.is_file():
            raise ConfigError(f"{src}: {path}: no such file, or not a regular one")
        if kind_of(path.name) is None:
            raise ConfigError(f"{src}: {path.name} is no raw shard; legal: a folder of them, or {_LEGAL}")
        check_file_name(path.name, f"{src}: shard")
    return Split("", root, tuple((str(path.relative_to(root)), path.stat().st_size) for path in paths))


def _shards(folder: Path, files: str, endings: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of the raw shards in a folder: their names match `files`, or have one of `endings`.
    Raises ConfigError for one that is no regular file.
    """
    paths = [
        path
        for path in sorted(folder.iterdir())
        if (fnmatchcase(path.name, files) if files else path.name.lower().endswith(endings))
    ]
    for path in paths:
        check_file_name(path.name, f"{folder}: shard")
        if not path.is_file():
            raise ConfigError(f"{path}: not a regular file; take it away, or give it another name")
        if kind_of(path.name) is None:
            raise ConfigError(f'{path}: [source] files = "{files}" matches it; it must end in {_LEGAL}')
    return tuple((path.name, path.stat().st_size) for path in paths)


def commands_of(splits: list[Split]) -> list[str]:
    """The shell commands that reading the splits runs: those behind a `pipe:` that a person typed."""
    urls = [shard.text for split in splits for shard in split.shards if isinstance(shard, Url)]
    return [url.removeprefix("pipe:") for url in urls if url.startswith("pipe:")]
