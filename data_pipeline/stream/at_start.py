"""What a log says of a stream where a run starts: its sources, what they leave out, and warnings."""

from itertools import combinations
from typing import Any

from data_pipeline.stream.stream import Stream


def describe(stream: Stream) -> list[str]:
    """One line a source, and one for each that leaves documents out."""
    lines: list[str] = []
    for source, share, too_long in zip(stream.sources, stream.shares, stream.too_long, strict=True):
        tokens: dict[str, Any] = source.manifest["tokens"]
        counts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
        masked = source.manifest.get("masked_targets")
        context = f"; {masked:,} of them are context without loss" if masked else ""
        lines.append(
            f"{source.folder}: {source.num_documents:,} documents ({counts} tokens{context}), share "
            f"{float(share):.4g}"
        )
        if len(too_long):
            names = ", ".join(source.name(int(document)) for document in too_long[:3])
            more = ", ..." if len(too_long) > 3 else ""
            lines.append(
                f"{source.folder}: {len(too_long):,} documents left out, a span in them (an image, an "
                f"utterance ...) is longer than the context of {stream.context_tokens}: {names}{more}"
            )
    return lines


def warnings(stream: Stream, num_sequences: int, max_epochs: float) -> list[str]:
    """One line for each source that a run of `num_sequences` passes over more than `max_epochs` times, and
    for each two that share shards."""
    lines = [
        f"warning: {source.folder}: the run passes over its {source.num_documents:,} documents {epochs:.1f} "
        f"times, more than data.max_epochs = {max_epochs:g}, and a model remembers what it reads so often; "
        f"lower total_tokens or the source's weight, add data, or raise data.max_epochs"
        for source, epochs in zip(stream.sources, stream.expected_epochs(num_sequences), strict=True)
        if epochs > max_epochs
    ]
    for one, other in combinations(stream.sources, 2):
        if shared := len(one.shard_hashes & other.shard_hashes):
            lines.append(
                f"warning: {one.folder} and {other.folder} share {shared} shards (sha256): their documents "
                f"are drawn by both weights, and passed over more often than data/epoch says"
            )
    return lines
