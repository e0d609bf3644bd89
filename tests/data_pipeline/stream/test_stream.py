import hashlib
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import ChangedIndex, ForeignTokenizer, SpanTooLong
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import random_document, random_documents, write_token_folder
from data_pipeline.shards.vocabulary import VectorFormat, Vocabulary
from data_pipeline.stream.mixture import MIN_BLOCK_DOCUMENTS
from data_pipeline.stream.stream import BlockPlan, Stream, StreamState

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})
CONTEXT = 64


def write(folder: Path, count: int, seed: int, median: int = 10, fingerprint: str = "a") -> TokenSource:
    documents = list(random_documents(VOCABULARY, count, seed, median_text_tokens=median, image_tokens=9))
    return TokenSource.open(
        write_token_folder(folder, documents, VOCABULARY, documents_per_shard=40, fingerprint=fingerprint)
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenSource, ...]:
    """Of 90, 300 and 41 documents; some of them longer than the context."""
    root = tmp_path_factory.mktemp("sources")
    found = tuple(write(root / str(i), n, i, m) for i, (n, m) in enumerate([(90, 10), (300, 20), (41, 5)]))
    assert max(int(source.lengths.max()) for source in found) > 2 * CONTEXT
    return found


def stream_of(
    sources: tuple[TokenSource, ...],
    weights: tuple[float, ...],
    *,
    seed: int = 1,
    step: int = 6,
    context: int = CONTEXT,
) -> Stream:
    pairs = list(zip(sources, weights, strict=False))
    return Stream(pairs, seed=seed, context_tokens=context, sequences_per_step=step)


def run(
    stream: Stream, num_steps: int, state: StreamState | None = None
) -> tuple[list[BlockPlan], list[StreamState]]:
    """Plans of some steps, and the states before the first and after each."""
    plans, states = [], [state or stream.start()]
    for _ in range(num_steps):
        plan, following = stream.plan_step(states[-1])
        plans.append(plan)
        states.append(following)
    return plans, states


def rows(plans: list[BlockPlan]) -> list[list[tuple[int, int, int, int]]]:
    """Per sequence, (source, document, start, slots) of its pieces."""
    return [
        [
            (int(p.source[i]), int(p.document[i]), int(p.start[i]), int(p.slots[i]))
            for i in range(p.first[s], p.first[s + 1])
        ]
        for p in plans
        for s in range(len(p))
    ]


def until_block(stream: Stream, block: int) -> tuple[list[list[tuple[int, int, int, int]]], StreamState]:
    """All sequences of the blocks before `block`, which are asked for one by one."""
    one = Stream(
        list(zip(stream.sources, stream.shares, strict=True)),
        seed=stream.seed,
        context_tokens=stream.context_tokens,
        sequences_per_step=1,
    )
    state, plans = one.start(), []
    while state.block < block:
        plan, state = one.plan_step(state)
        plans.append(plan)
    return rows(plans), state


@given(seed=st.integers(0, 2**40), context=st.integers(24, 200), which=st.integers(0, 2))
@settings(max_examples=30)
def test_an_epoch_holds_every_slot_of_every_document_once(
    sources: tuple[TokenSource, ...], seed: int, context: int, which: int
) -> None:
    source = sources[which]
    stream = stream_of((source,), (1.0,), seed=seed, context=context)
    for epochs in (1, 2):  # one block is one epoch of so small a source
        found, state = until_block(stream, epochs)
        slots = Counter((d, at) for row in found for _, d, start, n in row for at in range(start, start + n))
        expected = {
            (d, at): epochs for d in range(source.num_documents) for at in range(int(source.lengths[d]) - 1)
        }
        assert slots == expected
        assert stream.epochs(state) == (float(epochs),)
        assert state.sequences == len(found)


@given(seed=st.integers(0, 2**40), context=st.integers(24, 200))
@settings(max_examples=30)
def test_no_sequence_overflows_and_no_image_or_utterance_is_cut(
    sources: tuple[TokenSource, ...], seed: int, context: int
) -> None:
    stream = stream_of(sources, (0.5, 0.3, 0.2), seed=seed, context=context)
    plans, _ = run(stream, 12)
    for row in rows(plans):
        assert 1 <= sum(n for *_, n in row) <= context
        for s, d, start, n in row:
            for begin, end in sources[s].spans(d):
                inside = max(0, min(start + n, end) - max(start, begin))  # of its ids, as inputs
                assert inside in (0, end - begin)
    # and in the ids themselves: whoever opens also closes, within its sequence
    for row in rows(plans[:2]):
        for s, d, start, n in row:
            inputs = sources[s].read(d)[start : start + n]
            assert [int((inputs == token).sum()) for token in (3, 5)] == [
                int((inputs == token).sum()) for token in (4, 6)
            ]


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1, 1, 1), (0.65, 0.35), (0.9, 0.05, 0.05)])
def test_the_mixture_is_exact_after_every_block(
    sources: tuple[TokenSource, ...], weights: tuple[float, ...]
) -> None:
    stream = stream_of(sources, weights)
    for block in (1, 2, 3):
        found, state = until_block(stream, block)
        begun = Counter(s for row in found for s, _, start, _ in row if start == 0)
        total = sum(begun.values())
        assert [begun[i] for i in range(len(weights))] == [
            pytest.approx(float(share * total), abs=1) for share in stream.shares
        ], "a block ends where an epoch ends, which may be within a document of a share"
        epochs = [begun[i] / source.num_documents for i, source in enumerate(stream.sources)]
        assert stream.epochs(state) == pytest.approx(epochs, rel=1e-12)


def test_inside_a_block_a_document_that_is_cut_counts_once_as_begun(sources: tuple[TokenSource, ...]) -> None:
    source = sources[0]
    plans, states = run(stream_of((source,), (1.0,), step=1), 12)
    assert states[-1].block == 0, "the test needs states inside a block"
    stream = stream_of((source,), (1.0,), step=1)
    for steps in range(1, len(plans) + 1):
        starts = [start for row in rows(plans[:steps]) for _, _, start, _ in row]
        assert stream.epochs(states[steps]) == (starts.count(0) / source.num_documents,)
    assert any(starts), "the test needs a document that is cut"


def test_each_source_of_a_mixture_goes_through_its_documents_evenly(sources: tuple[TokenSource, ...]) -> None:
    stream = stream_of(sources, (0.5, 0.3, 0.2))
    found, _ = until_block(stream, 3)
    times = Counter((s, d) for row in found for s, d, start, _ in row if start == 0)
    for i, source in enumerate(sources):
        counts = [times[i, d] for d in range(source.num_documents)]
        passes = sum(counts) / len(counts)
        assert {int(passes), -int(-passes // 1)} >= set(counts), "no document twice before all once"


@given(
    seed=st.integers(0, 2**40),
    weights=st.lists(st.integers(1, 100), min_size=3, max_size=3),
    num_sources=st.integers(1, 3),
)
@settings(max_examples=12)
def test_each_input_comes_once_an_epoch_of_its_source(
    sources: tuple[TokenSource, ...], seed: int, weights: list[int], num_sources: int
) -> None:
    """Counted from the sequences alone, as they come: while documents of an epoch are missing, none comes
    again, and what a document predicts comes once. A source of fewer documents than MIN_BLOCK_DOCUMENTS asks
    of it gives some whole epochs together."""
    share = [weight / sum(weights[:num_sources]) for weight in weights[:num_sources]]
    stream = stream_of(sources[:num_sources], tuple(map(float, weights)), seed=seed)
    one_by_one = stream_of(sources[:num_sources], tuple(map(float, weights)), seed=seed, step=1)
    epochs = [
        1 if num_sources == 1 else math.ceil(MIN_BLOCK_DOCUMENTS * part / source.num_documents - 1e-9)
        for part, source in zip(share, sources, strict=False)
    ]
    expected = [
        Counter({(d, at): n for d in range(s.num_documents) for at in range(int(s.lengths[d]) - 1)})
        for s, n in zip(sources, epochs, strict=False)
    ]
    missing = [Counter(slots) for slots in expected]
    state, ended = one_by_one.start(), [0] * num_sources
    while state.block < 8:
        plan, state = one_by_one.plan_step(state)
        for source, document, start, slots in rows([plan])[0]:
            missing[source].subtract((document, at) for at in range(start, start + slots))
            assert min(missing[source][document, at] for at in range(start, start + slots)) >= 0
        for source, slots in enumerate(missing):
            if not slots.total():
                ended[source] += epochs[source]
                missing[source] = Counter(expected[source])
    assert any(ended)
    for source, done in enumerate(ended):
        assert done <= stream.epochs(state)[source] < done + epochs[source]


def test_a_run_that_began_in_the_first_order_goes_on_in_it(sources: tuple[TokenSource, ...]) -> None:
    """The plans of the first order are those of the version that had no other, by their hash."""
    stream = stream_of(sources, (0.6, 0.4))
    begun = json.loads(stream.start().to_json()) | {"format": 2}
    del begun["order"]
    plans, states = run(stream, 60, StreamState.from_json(json.dumps(begun)))
    assert {state.order for state in states} == {1} and states[-1].block >= 2
    assert StreamState.from_json(states[-1].to_json()) == states[-1], "and after another save"
    assert hashlib.sha256(json.dumps(rows(plans)).encode()).hexdigest()[:16] == "97c1105757ee47ab"
    assert rows(run(stream, 60)[0]) != rows(plans)


@given(
    seed=st.integers(0, 2**40),
    steps=st.lists(st.integers(1, 40), min_size=1, max_size=8),
    resumed=st.booleans(),
)
@settings(max_examples=30)
def test_the_order_knows_nothing_of_the_step_and_survives_every_stop(
    sources: tuple[TokenSource, ...], seed: int, steps: list[int], resumed: bool
) -> None:
    """Sequences are the same by whatever steps one gets there."""
    expected, states = run(stream_of(sources, (0.6, 0.4), seed=seed, step=sum(steps)), 1)
    state, found = None, []
    for step in steps:
        stream = stream_of(sources, (0.6, 0.4), seed=seed, step=step)
        state = state or stream.start()
        if resumed:  # another process that knows nothing but the JSON
            state = StreamState.from_json(state.to_json())
        plan, state = stream.plan_step(state)
        found.append(plan)
    assert rows(found) == rows(expected)
    assert state == states[-1]


def test_planning_twice_gives_the_same_plan_and_seeds_differ(sources: tuple[TokenSource, ...]) -> None:
    stream = stream_of(sources, (0.6, 0.4))
    plans, states = run(stream, 20)
    again, _ = stream.plan_step(states[3])
    assert rows([again]) == rows([plans[3]])
    other, _ = run(stream_of(sources, (0.6, 0.4), seed=2), 20)
    assert rows(other) != rows(plans)


def test_epochs_differ_in_documents_that_share_a_sequence(sources: tuple[TokenSource, ...]) -> None:
    found, _ = until_block(stream_of(sources[1:2], (1.0,)), 2)
    half = len(found) // 2
    together = [
        {frozenset(d for _, d, *_ in row) for row in part if len(row) > 1}
        for part in (found[:half], found[half:])
    ]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])


def test_long_documents_do_not_come_first(sources: tuple[TokenSource, ...]) -> None:
    """Packing takes the longest first; neither sequences nor the pieces in one keep that order."""
    found, _ = until_block(stream_of(sources[1:2], (1.0,)), 1)
    longest = [max(n for *_, n in row) for row in found]
    # packed but not shuffled -0.96; shuffled, of 219 sequences, +- 0.07 (one standard deviation)
    assert abs(np.corrcoef(np.arange(len(found)), longest)[0, 1]) < 0.3
    pairs = [row for row in found if len(row) > 1]
    assert 0.3 < np.mean([row[0][3] < row[-1][3] for row in pairs]) < 0.7


def test_a_plan_of_some_positions(sources: tuple[TokenSource, ...]) -> None:
    (plan,), _ = run(stream_of(sources, (0.6, 0.4), step=12), 1)
    all_rows = rows([plan])
    assert len(plan) == 12 and plan.filled_slots == sum(n for row in all_rows for *_, n in row)
    for r in range(3):
        assert rows([plan.take(np.arange(r, 12, 3))]) == all_rows[r::3]
    assert rows([plan.take(np.array([], np.int64))]) == []


# the state


def test_a_state_is_a_few_integers_and_json_keeps_it(sources: tuple[TokenSource, ...]) -> None:
    stream = stream_of(sources, (0.6, 0.4))
    _, states = run(stream, 5)
    text = states[-1].to_json()
    assert StreamState.from_json(text) == states[-1]
    values = json.loads(text)
    assert {k for k, v in values.items() if isinstance(v, int)} == {
        "format", "block", "sequence", "sequences", "seed", "context_tokens", "order",
    }  # fmt: skip
    assert values["sources"] == [
        [s.index_hash, share] for s, share in zip(sources, ["3/5", "2/5"], strict=False)
    ]
    del values["order"]
    first = values | {"format": 1, "fingerprint": 7}
    assert StreamState.from_json(json.dumps(first)) == replace(states[-1], order=1), "it had the fingerprint"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 9}', '{"format": 1, "block": 3}', "null", '{"format": 3, "order": 3}'],
)
def test_what_is_no_state_is_said_so(text: str) -> None:
    with pytest.raises(ConfigError, match="not a stream state of format 3"):
        StreamState.from_json(text)


def test_a_state_of_another_stream_is_refused_with_the_reason(
    tmp_path: Path, sources: tuple[TokenSource, ...]
) -> None:
    stream = stream_of(sources, (0.6, 0.4))
    state = stream.start()
    with pytest.raises(ConfigError, match="seed = 1, but the saved stream has seed = 2"):
        stream.plan_step(replace(state, seed=2))
    with pytest.raises(
        ConfigError, match="context_tokens = 64, but the saved stream has context_tokens = 32"
    ):
        stream.plan_step(replace(state, context_tokens=32))
    with pytest.raises(ConfigError, match="1 sources, but the saved stream has 2"):
        stream_of(sources[:1], (1.0,)).plan_step(state)
    with pytest.raises(ConfigError, match=r"0: share of the documents 1/2, but 3/5 in the saved stream"):
        stream_of(sources, (0.5, 0.5)).plan_step(state)
    changed = write(tmp_path / "changed", 90, 77)
    with pytest.raises(
        ChangedIndex, match=r"changed: its index is \w{12}, but the saved stream was made with"
    ):
        stream_of((changed, sources[1]), (0.6, 0.4)).plan_step(state)


# sources that do not go together


def test_sources_with_foreign_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", 20, 0)
    theirs = write(tmp_path / "theirs", 20, 0, fingerprint="b")
    with pytest.raises(ForeignTokenizer, match=r"theirs: text tokenizer b-text, but .*ours has a-text"):
        stream_of((ours, theirs), (1, 1))
    wider = Vocabulary(sizes={"text": 300, "image": 65, "speech": 32})
    documents = list(random_documents(wider, 20, 0, median_text_tokens=5, image_tokens=9))
    other = TokenSource.open(write_token_folder(tmp_path / "wide", documents, wider, documents_per_shard=9))
    with pytest.raises(ForeignTokenizer, match=r"wide: vocabulary \{'text': 300, 'image': 65"):
        stream_of((ours, other), (1, 1))
    sizes = {"text": 300, "image": 1}
    pixels = VectorFormat(features=4, dtype="uint8")
    formats = {
        "ids": {},
        "four": {"image": pixels},
        "five": {"image": pixels.model_copy(update={"features": 5})},
    }

    def folder_of(name: str) -> TokenSource:
        vocabulary = Vocabulary(sizes=sizes, vectors=formats[name])
        write_token_folder(tmp_path / name, [np.array([1, 9, 2])], vocabulary, documents_per_shard=9)
        return TokenSource.open(tmp_path / name)

    ids, four, five = map(folder_of, formats)
    with pytest.raises(
        ForeignTokenizer, match=r"four: vocabulary .* with vectors \{'image': .*, but .*ids has"
    ):
        stream_of((ids, four), (1, 1))
    with pytest.raises(ForeignTokenizer, match=r"five: .*'features': 5,.*, but .*four has .*'features': 4,"):
        stream_of((four, five), (1, 1))


def _with_long_images(folder: Path, count: int, of: int) -> TokenSource:
    rng = np.random.default_rng(0)
    documents = [
        random_document(rng, VOCABULARY, [("text", 5), ("image", 63 if i % (of // count) == 1 else 9)])
        for i in range(of)
    ]
    return TokenSource.open(write_token_folder(folder, documents, VOCABULARY, documents_per_shard=100))


def test_documents_with_an_image_longer_than_the_context_are_left_out_and_counted(
    tmp_path: Path,
) -> None:
    source = _with_long_images(tmp_path, 2, 400)
    stream = stream_of((source,), (1.0,))
    assert stream.too_long[0].tolist() == [1, 201]
    assert stream_of((source,), (1.0,), context=65).too_long[0].tolist() == []
    found, state = until_block(stream, 1)
    assert {d for row in found for _, d, *_ in row} == set(range(400)) - {1, 201}
    assert stream.epochs(state) == (1.0,)


def test_too_many_of_them_are_an_error(tmp_path: Path) -> None:
    source = _with_long_images(tmp_path, 8, 400)
    with pytest.raises(
        SpanTooLong,
        match=r"8 of 400 .*context_tokens = 64; raise it, or data.max_too_long_frac.*: the longest takes 65",
    ):
        stream_of((source,), (1.0,))
    left = Stream(
        [(source, 1.0)], seed=1, context_tokens=CONTEXT, sequences_per_step=6, max_too_long_frac=0.02
    )
    assert left.num_too_long == 8 and left.num_documents == 400


def test_a_source_of_nothing_but_them_is_an_error_whatever_is_allowed(tmp_path: Path) -> None:
    ids = random_document(np.random.default_rng(0), VOCABULARY, [("text", 5), ("image", 63)])
    source = TokenSource.open(write_token_folder(tmp_path, [ids] * 4, VOCABULARY, documents_per_shard=4))
    with pytest.raises(SpanTooLong, match=r"4 of 4 documents hold .*context_tokens = 64; raise it: the"):
        Stream([(source, 1.0)], seed=1, context_tokens=CONTEXT, sequences_per_step=6, max_too_long_frac=1.0)


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.3, 0.2)])
def test_expected_epochs_are_those_that_come(
    sources: tuple[TokenSource, ...], weights: tuple[float, ...]
) -> None:
    stream = stream_of(sources[: len(weights)], weights)
    found, state = until_block(stream, 4)
    # Expected are full sequences: these are 94 to 97 % full, packed of few documents.
    filled = sum(n for row in found for *_, n in row) / (CONTEXT * len(found))
    expected = stream.expected_epochs(len(found))
    assert [e * filled for e in expected] == pytest.approx(stream.epochs(state), rel=0.05)


@pytest.mark.parametrize(("step", "context"), [(0, 64), (1, 0)])
def test_a_stream_of_nothing_is_refused(sources: tuple[TokenSource, ...], step: int, context: int) -> None:
    with pytest.raises(ConfigError, match="sequences_per_step >= 1"):
        stream_of(sources, (1.0,), step=step, context=context)
    with pytest.raises(ConfigError, match="needs a source"):
        Stream([], seed=1, context_tokens=64, sequences_per_step=1)
    empty = write_token_folder(
        sources[0].folder.parent / f"empty{step}", [], VOCABULARY, documents_per_shard=1
    )
    with pytest.raises(ConfigError, match="holds no documents"):
        stream_of((TokenSource.open(empty),), (1.0,))


def test_a_single_short_document_makes_a_stream(tmp_path: Path) -> None:
    source = write(tmp_path, 1, 0, median=3)
    (plan,), (_, state) = run(stream_of((source,), (1.0,), step=5), 1)
    assert [d for row in rows([plan]) for _, d, start, _ in row if start == 0] == [0] * state.block
    assert state.block == 5 and stream_of((source,), (1.0,)).epochs(state) == (5.0,)
