import numpy as np

from data_pipeline.shards.index import Document
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import BOS, EOS
from pretrain.generation.continuation import continue_prompts, room_behind
from pretrain.generation.decoding import read_tokens
from pretrain.generation.grammar import Grammar, Place
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.sampling import Sampling
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.models.random_batch import MOT, tiny_config
from tests.pretrain.tiny_data import VOCABULARY, part

MODEL = tiny_config(MOT, context_tokens=24, vocab_tokens=VOCABULARY.size + 4)
GRAMMAR = Grammar(VOCABULARY, {"image": 4})
STATE = RoutingState()


def prompts() -> list[Document]:
    rng = np.random.default_rng(2)
    ids = np.array([BOS]), np.concatenate([[BOS], part("text", 2, rng)]), np.array([BOS, 9, 10])
    return [Document(each) for each in ids]


def continued(
    decoder: Decoder, *, seed: int = 1, temperature: float = 1.0, samples: int = 3, **options: int
) -> list[list[Document]]:
    sampling = Sampling(temperature, seed=seed)
    return continue_prompts(decoder, prompts(), GRAMMAR, sampling, STATE, samples=samples, **options)


def flat(found: list[list[Document]]) -> list[tuple[int, ...]]:
    return [tuple(sample.ids.tolist()) for of_prompt in found for sample in of_prompt]


def test_1000_free_samples_of_an_untrained_model_stay_inside_the_grammar() -> None:
    found = continue_prompts(
        Decoder(MODEL),
        [Document(np.array([BOS]))],
        GRAMMAR,
        Sampling(),
        STATE,
        samples=1000,
        sequences_at_once=500,
    )
    seen: dict[str, int] = {}
    for ids, _ in found[0]:
        document = np.concatenate([[BOS], ids, [] if ids[-1] == EOS else [EOS]]).astype(int)
        assert len(ids) <= MODEL.context_tokens and (ids[-1] == EOS or len(ids) == MODEL.context_tokens)
        for span in read_spans(document, VOCABULARY):  # raises for ids that no tokenizer writes
            assert span.modality != "image" or span.end - span.start == 6
            seen[span.modality] = seen.get(span.modality, 0) + 1
    assert all(seen[modality] > 100 for modality in VOCABULARY.modalities), seen


def test_greedy_ids_are_the_likeliest_of_one_pass() -> None:
    """Recomputed without a cache: of every id, the logits of all before it."""
    decoder = perturbed(MODEL).double()
    found = continued(decoder, temperature=0, samples=1)
    for prompt, (sample,) in zip(prompts(), found, strict=True):
        room, place, whole = room_behind(len(prompt.ids), MODEL.context_tokens), Place(), prompt.ids
        for number, token in enumerate(sample.ids):
            logits, _ = read_tokens(decoder, KeyCache.empty(1), [0], [Document(whole)], VOCABULARY, STATE)
            allowed = GRAMMAR.allowed(place, room - number)
            scores = np.where(allowed, logits[0, : VOCABULARY.size].numpy(), -np.inf)
            assert token == scores.argmax()
            place, whole = GRAMMAR.after(place, int(token)), np.append(whole, token)


def test_a_sample_depends_on_seed_and_number_alone() -> None:
    """Not on what is drawn beside it; another seed gives others."""
    decoder = perturbed(MODEL).double()
    whole = continued(decoder, max_tokens=8)
    assert flat(continued(decoder, max_tokens=8, sequences_at_once=4)) == flat(whole)
    assert flat(continued(decoder, max_tokens=8, samples=1)) == flat([of_prompt[:1] for of_prompt in whole])
    assert flat(continued(decoder, max_tokens=8, seed=2)) != flat(whole)
    assert len(set(flat(whole))) == 9


def test_max_tokens_and_a_goal() -> None:
    decoder = perturbed(MODEL)
    assert all(len(sample.ids) <= 5 for of in continued(decoder, max_tokens=5) for sample in of)
    image = Grammar(VOCABULARY, {"image": 4}, "image")
    for of in continue_prompts(decoder, prompts(), image, Sampling(), STATE, samples=2):
        for ids, _ in of:
            assert [VOCABULARY.modalities[m] for m in VOCABULARY.modality_of(ids)[1:-1]] == ["image"] * 4
            assert (ids[0], ids[-1]) == VOCABULARY.delimiters("image")
