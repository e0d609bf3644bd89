"""Bytes of the documents of a plan, as the index knows them, and the fingerprint that reading them makes."""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.fingerprint import UNREADABLE, chain, sequence_weights, step_digest
from data_pipeline.stream.stream import BlockPlan, Stream
from pretrain.audit.steps import ConsumedStep, RunData

Document = tuple[int, int]
"""(number of the source, number of the document in it)."""


def digest_of(stream: Stream, plan: BlockPlan, unreadable: Collection[Document] = ()) -> int:
    """The digest of a step whose documents were read as they are indexed, but for the `unreadable`."""
    contents = np.zeros(len(plan.document), np.uint64)
    for number, source in enumerate(stream.sources):
        own = plan.source == number
        contents[own] = contents_of(source, plan.document[own])
    for number, document in unreadable:
        contents[(plan.source == number) & (plan.document == document)] = UNREADABLE
    return step_digest(contents, plan.weight, sequence_weights(len(plan)), np.diff(plan.first))


def contents_of(source: TokenSource, documents: np.ndarray) -> np.ndarray:
    """uint64 [n]; the checksum that `TokenSource.fetch` gives for each document, from the index."""
    contents = source.index.crc32[documents].astype(np.uint64)
    if source.has_masks or source.index.vectors_crc32 is not None:
        for place, document in enumerate(documents.tolist()):
            _, of_vectors = source.vectors_place(document)
            contents[place] = source.checksum(document, int(contents[place]), of_vectors)
    return contents


def differing_rows(run: RunData, steps: Iterable[ConsumedStep]) -> Iterator[tuple[int, bool]]:
    """(step, whether its fingerprint is that of the plan) of each row of metrics that has one.

    Documents that a row names as unreadable count as such from the row before it on.
    """
    rows = {int(str(row["step"])): row for row in run.rows if "data/fingerprint" in row}
    last = {went.step: place for place, went in enumerate(run.went)}
    begun, fingerprint, new_from = 0, 0, dict[Document, int]()
    for step, row in sorted(rows.items()):
        for document in documents_named(run.stream, row.get("data/unreadable_documents", ())):
            new_from.setdefault(document, begun)
        begun = last.get(step, begun) + 1
    for place, consumed in enumerate(steps):
        unreadable = [document for document, first in new_from.items() if place >= first]
        digest = digest_of(run.stream, consumed.plan, unreadable)
        fingerprint = chain(fingerprint, digest, len(consumed.plan))
        step = consumed.went.step
        if step in rows and last[step] == place:
            yield step, rows[step]["data/fingerprint"] == f"{fingerprint:016x}"


def documents_named(stream: Stream, names: object) -> list[Document]:
    """The documents of names "folder/shard/key", as metrics have them, of those that are found."""
    found: list[Document] = []
    for name in names if isinstance(names, Sequence) else ():
        for number, source in enumerate(stream.sources):
            folder = f"{source.folder}/"
            if str(name).startswith(folder):
                wanted = str(name).removeprefix(folder)
                found += [(number, document) for document in documents_of_name(source, wanted)]
    return found


def documents_of_name(source: TokenSource, wanted: str) -> list[int]:
    """Numbers of the documents of a name "shard/key", of which one shard is searched."""
    first, last = source.documents_of_shard(wanted.partition("/")[0])
    return [document for document in range(first, last) if source.name(document) == wanted]
