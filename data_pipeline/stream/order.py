"""The order in which a source gives its documents: pure arithmetic, no shuffle buffer, no stored permutation.

A source of n documents gives documents j = 0, 1, 2, ...; epoch e is j in [e*n, (e+1)*n) and holds each
document once. Inside an epoch the order is a two-level shuffle: the documents are cut into chunks of
neighbours, the chunks are permuted over the whole epoch, then documents are permuted inside windows of many
chunks. So reading stays local (a window touches a bounded number of chunks), and a source that fits into one
window is permuted wholly.
"""

import numpy as np

CHUNK_DOCUMENTS = 128
WINDOW_CHUNKS = 1024
_ROUNDS = 6  # of the Feistel network; Luby and Rackoff need 4 of ideal rounds
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """A bijective scramble of 64-bit words, uint64 [...] -> uint64 [...] (splitmix64's output function)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*values: int) -> int:
    """A 64-bit key from a few integers; it depends on every integer and on their order."""
    key = 0
    for value in values:
        key = _mix_int((key + _GOLDEN + value) & _MASK)
    return key


def _mix_int(x: int) -> int:
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def permute(indices: np.ndarray, n: int, key: int) -> np.ndarray:
    """Image of each index under the pseudo-random permutation of [0, n) that `key` names; int64, same shape.

    A balanced Feistel network over the smallest even number of bits that holds n, applied again to results
    outside of [0, n) ("cycle walking"), which at most three of four are.
    """
    if n < 1:
        raise ValueError(f"a permutation of {n} elements")
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(key_of(key, r)) for r in range(_ROUNDS)]
    result = indices.astype(np.uint64)
    walking = np.arange(result.size)
    flat = result.reshape(-1)
    while walking.size:
        left, right = flat[walking] >> half, flat[walking] & low
        for k in keys:
            left, right = right, left ^ (mix(right ^ k) & low)
        flat[walking] = (left << half) | right
        walking = walking[flat[walking] >= np.uint64(n)]
    return flat.reshape(indices.shape).astype(np.int64)


def documents_at(
    first: int,
    count: int,
    num_documents: int,
    key: int,
    *,
    chunk_documents: int = CHUNK_DOCUMENTS,
    window_chunks: int = WINDOW_CHUNKS,
) -> np.ndarray:
    """Documents that a source of `num_documents` gives at j = first ... first + count - 1; int64 [count]."""
    documents = [np.zeros(0, np.int64)]
    while count > 0:
        epoch, start = divmod(first, num_documents)
        taken = min(count, num_documents - start)
        position = np.arange(start, start + taken)
        epoch_key = key_of(key, epoch)
        documents.append(_shuffled(position, num_documents, epoch_key, chunk_documents, window_chunks))
        first, count = first + taken, count - taken
    return np.concatenate(documents)


def _shuffled(position: np.ndarray, n: int, key: int, chunk: int, window_chunks: int) -> np.ndarray:
    """Document at each position of an epoch: a bijection of [0, n), because every step is a bijection."""
    window = chunk * window_chunks
    mixed = np.empty_like(position)
    for w in range(int(position[0]) // window, int(position[-1]) // window + 1):
        inside = slice(*np.searchsorted(position, [w * window, (w + 1) * window]))
        size = min(window, n - w * window)
        mixed[inside] = w * window + permute(position[inside] - w * window, size, key_of(key, 1, w))
    if n > window:
        whole = n // chunk
        in_chunk = mixed < whole * chunk  # the last n % chunk documents are no chunk and keep their place
        moved = permute(mixed[in_chunk] // chunk, whole, key_of(key, 2)) * chunk
        mixed[in_chunk] = moved + mixed[in_chunk] % chunk
    # rotated by a random number of documents, so that chunks are cut elsewhere in every epoch, and other
    # documents keep their place at the end
    return (mixed + key_of(key, 3) % n) % n
