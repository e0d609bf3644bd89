"""Facts of the demo corpus: do generated pictures, captions and utterances state the digits of their prompts?

A prompt is a part of a held-out document, as of conditional losses: a caption, of which a picture is drawn; a
picture, of which a caption is written; a text, whose last line is spoken. Captions are read by a rule.
Pictures and utterances are read by classifiers, which err: their own accuracy stands beside every figure.
Importing this module imports no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int
from PIL import Image

from data_pipeline.demo.facts import Match, caption_digits, match_digits, said_digits
from data_pipeline.demo.picture_judge import (
    Picture,
    PictureJudge,
    heldout_features,
    judge_pictures,
    train_picture_judge,
)
from data_pipeline.demo.scenes import PICTURE_PX
from data_pipeline.demo.speech_judge import SpeechJudge, train_speech_judge
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.stream.order import documents_at
from data_pipeline.tokenize.media.pictures import png
from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.evaluation.documents import ORDER_KEY
from pretrain.generation.picture_distance import Features, PictureDistance, frechet_distance
from pretrain.generation.prompts import Prompt, part_prompts
from pretrain.generation.sampling import Sampling

if TYPE_CHECKING:  # it imports torch
    from pretrain.generation.trained_model import TrainedModel

IMAGE, SPEECH = "image", "speech"
MOST_TOKENS = {(TEXT, IMAGE): None, (IMAGE, TEXT): 96, (TEXT, SPEECH): 192}
"""Direction -> ids of a sample at most; None: as many as it takes."""
TRAINING_UTTERANCES, HELDOUT_UTTERANCES = 8000, 500
LEAST_UTTERANCES = 200
"""Utterances that a judge of speech is trained on at least."""

Digits = tuple[int, ...]
Ids = Int[np.ndarray, " tokens"]


class FactPrompt(NamedTuple):
    """A prompt with the digits that what follows should state."""

    document: Document
    """The beginning of a document, <bos> first."""
    wanted: Digits
    name: str
    truth: Document
    """What follows in the document."""


class Accuracy(NamedTuple):
    """Shares of digits that are right."""

    exact: float
    """Share of the samples that state exactly the digits that they should, in their order."""
    per_digit: float
    """Digits that are stated and should be, over the larger of the two numbers, summed over all samples."""

    @classmethod
    def of(cls, matches: Sequence[Match]) -> "Accuracy":
        larger = sum(match.larger for match in matches)
        return cls(
            sum(match.exact for match in matches) / len(matches),
            sum(match.shared for match in matches) / larger if larger else 0.0,
        )


@dataclass(frozen=True)
class FactScore:
    """The facts of one direction."""

    samples: int
    accuracy: Accuracy
    foreign: Accuracy
    """What the same samples score against the digits of the next prompt: what chance gives."""
    judge: Accuracy | None
    """How well the judge reads held-out scans or utterances, which were not generated; None: a rule reads."""
    distance: PictureDistance | None = None
    """Of pictures alone."""


@dataclass(frozen=True)
class Judges:
    """Judges of pictures and speech, with their own accuracy on held-out scans and utterances."""

    picture: PictureJudge
    picture_accuracy: Accuracy
    scans: Features
    """Features of pictures of held-out scans."""
    speech: SpeechJudge
    speech_accuracy: Accuracy


def fact_prompts(
    source: TokenSource, tokenizers: Mapping[str, Tokenizer], *, documents: int, context_tokens: int
) -> dict[tuple[str, str], list[FactPrompt]]:
    """By direction, the prompts of the first `documents` documents that hold both parts, as far as digits are
    stated in them. Raises ConfigError where a direction has fewer than two."""
    found = part_prompts(source, documents, context_tokens)
    prompts = {
        direction: [
            FactPrompt(prompt.document, wanted, prompt.name, prompt.truth)
            for prompt in found.get(direction, ())
            if prompt.truth is not None and (wanted := _wanted(direction, prompt, tokenizers[TEXT]))
        ]
        for direction in MOST_TOKENS
    }
    for (a, b), own in prompts.items():
        if len(own) < 2:
            raise ConfigError(
                f"{source.folder}: {len(own)} of {documents} documents with {a} and {b} state digits as the "
                "demo corpus does; facts are known of that corpus alone (`motley demo-corpus`), and need two"
            )
    return prompts


def _wanted(direction: tuple[str, str], prompt: Prompt, text: Tokenizer) -> Digits:
    """The digits that a sample of the direction should state."""
    if direction == (IMAGE, TEXT):
        assert prompt.truth is not None
        return caption_digits(text.decode(prompt.truth.ids))
    written = text.decode(prompt.ids[1:])
    return caption_digits(written) if direction == (TEXT, IMAGE) else said_digits(written)


def train_judges(
    tokenizers: Mapping[str, Tokenizer], train: TokenSource, heldout: TokenSource, seed: int = 0
) -> Judges:
    """Judges for what comes out of these tokenizers. The judge of pictures is trained on the scans of
    training pictures, that of speech on utterances of `train`. Raises ConfigError where those are too few."""
    utterances, said = _apart(_spoken(train, tokenizers[TEXT], TRAINING_UTTERANCES))
    _check_enough(train, said)
    speech = train_speech_judge(utterances, said)
    seen = _through(tokenizers[IMAGE])
    picture = train_picture_judge(seen, seed)
    judged, truth = _apart(_spoken(heldout, tokenizers[TEXT], HELDOUT_UTTERANCES))
    heard = speech.digits(judged)
    return Judges(
        picture,
        Accuracy.of(judge_pictures(picture, seen, seed)),
        heldout_features(picture, seen, seed),
        speech,
        Accuracy.of([match_digits(h, t) for h, t in zip(heard, truth, strict=True)]),
    )


def check_utterances(train: TokenSource, tokenizers: Mapping[str, Tokenizer]) -> None:
    """Raise ConfigError if the utterances of `train` are too few to train a judge of speech. No more are read
    than show that they are enough."""
    _check_enough(train, (digits for _, digits in _spoken(train, tokenizers[TEXT], TRAINING_UTTERANCES)))


def _check_enough(train: TokenSource, said: Iterable[Digits]) -> None:
    """Raise ConfigError unless utterances, whose words hold the digits `said`, are enough."""
    count, unsaid = 0, set(range(10))
    for digits in said:
        count, unsaid = count + 1, unsaid - set(digits)
        if count >= LEAST_UTTERANCES and not unsaid:
            return
    raise ConfigError(
        f"{train.folder}: {count} utterances with a text beside them; a judge of speech is "
        f"trained on at least {LEAST_UTTERANCES}, which say every digit"
    )


def _through(tokenizer: Tokenizer) -> Callable[[Picture], Picture]:
    """A function that returns a picture as codes of the tokenizer show it."""
    return lambda picture: _shown(tokenizer, tokenizer.encode(tokenizer.read(png(picture))))


def _shown(tokenizer: Tokenizer, codes: np.ndarray) -> Picture:
    """The picture of codes or vectors, in the size of the demo corpus."""
    picture = Image.fromarray(tokenizer.decode(codes))
    return np.asarray(picture.resize((PICTURE_PX, PICTURE_PX), Image.Resampling.BOX))


def _apart(spoken: Iterable[tuple[Ids, Digits]]) -> tuple[list[Ids], list[Digits]]:
    """Lists of the units and of the digits of utterances."""
    found = list(spoken)
    return [units for units, _ in found], [digits for _, digits in found]


def _spoken(source: TokenSource, text: Tokenizer, most: int) -> Iterator[tuple[Ids, Digits]]:
    """(units of an utterance, digits whose words it holds, from the text beside it) of each of the first
    `most` documents that hold both."""
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        if most == 0:
            break
        if not len(source.spans(document)):
            continue
        ids = source.read(document).astype(np.int64)
        parts = {span.modality: ids[span.start : span.end] for span in read_spans(ids, source.vocabulary)}
        if TEXT in parts and SPEECH in parts:
            most -= 1
            yield _codes(parts[SPEECH], SPEECH, source.vocabulary), said_digits(text.decode(parts[TEXT]))


def _codes(span: Ids, modality: str, vocabulary: Vocabulary) -> Ids:
    """The codes of a span without its delimiters."""
    return span[1:-1] - vocabulary.first_code(modality)


def judge_facts(
    model: "TrainedModel", train: TokenSource, heldout: TokenSource, *, documents: int, sampling: Sampling
) -> dict[tuple[str, str], FactScore]:
    """The facts of a model on `documents` documents of `heldout` per direction, by judges that are trained on
    `train` and the scans of training pictures. Raises ConfigError."""
    context = model.decoder.config.context_tokens
    prompts = fact_prompts(heldout, model.tokenizers, documents=documents, context_tokens=context)
    return score_facts(model, prompts, train_judges(model.tokenizers, train, heldout), sampling)


def score_facts(
    model: "TrainedModel",
    prompts: Mapping[tuple[str, str], Sequence[FactPrompt]],
    judges: Judges,
    sampling: Sampling,
) -> dict[tuple[str, str], FactScore]:
    """The facts of a sample of every prompt, by direction. Equal arguments give equal scores."""
    from pretrain.generation.continuation import continue_prompts

    scores = {}
    for direction, own in prompts.items():
        grammar = model.grammar(direction[1])
        samples = continue_prompts(
            model.decoder, [prompt.document for prompt in own], grammar, sampling, model.routing_state,
            samples=1, max_tokens=MOST_TOKENS[direction],
        )  # fmt: skip
        written = [of[0] for of in samples]
        stated = _stated(direction[1], written, model, judges)
        wanted = [prompt.wanted for prompt in own]
        scores[direction] = FactScore(
            len(own),
            Accuracy.of([match_digits(s, w) for s, w in zip(stated, wanted, strict=True)]),
            Accuracy.of([match_digits(s, w) for s, w in zip(stated, [*wanted[1:], wanted[0]], strict=True)]),
            {IMAGE: judges.picture_accuracy, SPEECH: judges.speech_accuracy}.get(direction[1]),
            _distance(written, own, model, judges) if direction[1] == IMAGE else None,
        )
    return scores


def _stated(
    modality: str, samples: Sequence[Document], model: "TrainedModel", judges: Judges
) -> list[Digits]:
    """The digits that samples of a modality state."""
    tokenizer = model.tokenizers[modality]
    if modality == TEXT:
        ids = [sample.ids for sample in samples]
        return [caption_digits(tokenizer.decode(of[of != model.vocabulary.eos])) for of in ids]
    if modality == SPEECH:
        return judges.speech.digits([_codes(sample.ids, modality, model.vocabulary) for sample in samples])
    return [judges.picture.digits(picture) for picture in _pictures(samples, model)]


def _pictures(samples: Sequence[Document], model: "TrainedModel") -> list[Picture]:
    """The pictures that documents of one image are, in the size of the demo corpus."""
    vectors = IMAGE in model.vocabulary.vectors
    return [
        _shown(
            model.tokenizers[IMAGE],
            sample.vectors[IMAGE] if vectors else _codes(sample.ids, IMAGE, model.vocabulary),
        )
        for sample in samples
    ]


def _distance(
    samples: Sequence[Document], prompts: Sequence[FactPrompt], model: "TrainedModel", judges: Judges
) -> PictureDistance:
    """The distances of samples, and of the true pictures of their prompts, to those of held-out scans."""
    sets = (samples, [prompt.truth for prompt in prompts])
    features = ([judges.picture.features(picture) for picture in _pictures(of, model)] for of in sets)
    return PictureDistance(*(frechet_distance(np.array(of), judges.scans) for of in features))


def fact_row(scores: Mapping[tuple[str, str], FactScore], prefix: str = "eval/facts") -> dict[str, float]:
    """Scores as metrics by name."""
    row = {}
    for (a, b), score in scores.items():
        named = {"": score.accuracy, "foreign_": score.foreign, "judge_": score.judge}
        for kind, accuracy in named.items():
            if accuracy is not None:
                row[f"{prefix}/{a}_to_{b}/{kind}exact"] = accuracy.exact
                row[f"{prefix}/{a}_to_{b}/{kind}per_digit"] = accuracy.per_digit
        if score.distance is not None:
            row[f"{prefix}/{a}_to_{b}/frechet"] = score.distance.samples
            row[f"{prefix}/{a}_to_{b}/truth_frechet"] = score.distance.truths
    return row


def describe_facts(scores: Mapping[tuple[str, str], FactScore]) -> list[str]:
    """A line per direction, in which the judge's own accuracy stands beside the figures."""
    lines = []
    for (a, b), score in scores.items():
        judge = "read by a rule"
        if score.judge is not None:
            judge = f"the judge itself: {score.judge.exact:.3f} and {score.judge.per_digit:.3f}"
        lines.append(
            f"facts, {a} -> {b}: exact {score.accuracy.exact:.3f}, per digit {score.accuracy.per_digit:.3f} "
            f"of {score.samples} samples (against another prompt: {score.foreign.exact:.3f} and "
            f"{score.foreign.per_digit:.3f}; {judge})"
        )
        if score.distance is not None:
            samples, truths = score.distance
            lines.append(
                f"pictures, {a} -> {b}: Frechet distance over features of the judge of digits {samples:.3g}, "
                f"of the true pictures {truths:.3g} (to pictures of held-out scans; it is no FID)"
            )
    return lines
