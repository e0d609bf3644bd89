"""Opening a folder of token shards behind a URL: its manifest and index are fetched, its shards are not."""

from typing import Any

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.folder import RemoteFolder, RemoteShards, SourceGone
from data_pipeline.remote.location import RemoteSettings, check_folder, shown, shown_file
from data_pipeline.shards.faults import ChangedIndex
from data_pipeline.shards.index import TokenSource, manifest_hash
from data_pipeline.shards.index_file import INDEX, Index, map_arrays, read_header
from data_pipeline.shards.tar import MANIFEST, ShardError, Url, read_manifest

_ADVICE = (
    f"Training from a URL needs the {INDEX} that `motley tokenize` wrote beside the shards: copy it there "
    "with them; where it is lost, `motley train` makes it again from a folder of files"
)


def open_remote(url: Url, settings: RemoteSettings) -> TokenSource:
    """Open the folder of token shards behind a URL.

    Raises ConfigError for a URL that is none, SourceGone where it does not answer, ShardError for a manifest
    that this version does not read and without an index.
    """
    folder = _folder(url, settings)
    manifest = _manifest(folder)
    header, index = _index(folder, manifest)
    return TokenSource(Url(shown(url)), manifest, header, index, RemoteShards(folder, manifest["shards"]))


def remote_manifest(url: Url, settings: RemoteSettings) -> dict[str, Any]:
    """The manifest of the folder of token shards behind a URL. Raises as open_remote."""
    return _manifest(_folder(url, settings))


def _folder(url: Url, settings: RemoteSettings) -> RemoteFolder:
    try:
        check_folder(url.text)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return RemoteFolder(url, settings)


def _manifest(folder: RemoteFolder) -> dict[str, Any]:
    """The manifest of a folder as it is now; that of the cache, where nothing may be fetched."""
    if folder.may_fetch or not (folder.local / MANIFEST).is_file():
        folder.fetch(MANIFEST)
    try:
        return read_manifest(folder.local)
    except ShardError as error:
        raise ShardError(str(error).replace(str(folder.local), shown(folder.url))) from None


def _index(folder: RemoteFolder, manifest: dict[str, Any]) -> tuple[dict[str, Any], Index]:
    """(header, arrays) of the index for a manifest; one process of a machine fetches it."""
    key, where, wanted = folder.key(INDEX), shown_file(folder.url, INDEX), manifest_hash(manifest)
    with folder.telling(INDEX), folder.cache.held(key):
        if folder.cache.is_there(key):
            try:
                if (mapped := _mapped(folder, wanted)) is not None:
                    return mapped
            except ConfigError:
                pass  # it was damaged here
        try:
            folder.fetch(INDEX)
        except SourceGone as error:
            raise SourceGone(f"{error}. {_ADVICE}") from None
        try:
            mapped = _mapped(folder, wanted)
        except ChangedIndex:
            raise ChangedIndex(f"{where}: damaged, it does not match its own hash. {_ADVICE}") from None
    if mapped is None:
        raise ShardError(f"{where}: made for other shards than {MANIFEST} lists. {_ADVICE}")
    return mapped


def _mapped(folder: RemoteFolder, wanted: str) -> tuple[dict[str, Any], Index] | None:
    """The index that was fetched; None if it is for another manifest than that of the hash `wanted`."""
    header = read_header(folder.local)
    if header is None or header["manifest"] != wanted:
        return None
    return header, map_arrays(folder.local, header)
