"""`motley generate`: what a trained model writes, draws and speaks, as files and one page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.atomic import atomic_file, atomic_folder
from data_pipeline.files.nearest_word import did_you_mean
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.tar import ShardError
from parallel.world import World
from pretrain.generation.continuation import continue_prompts, room_behind
from pretrain.generation.grammar import FREE, Grammar
from pretrain.generation.images import denoising_of
from pretrain.generation.page import ShownPrompt, page
from pretrain.generation.pieces import decode, named_files
from pretrain.generation.prompts import Prompt, heldout_prompts, prompt_of
from pretrain.generation.rules import DecodeRule, PrefillRule, decoding_rules
from pretrain.generation.sampling import Sampling
from pretrain.generation.trained_model import TrainedModel, open_model


@dataclass(frozen=True)
class Request:
    """What is asked of a model."""

    parts: Sequence[tuple[str, str]]
    """(modality, text or path of a file) of the prompt, in order; empty with `heldout`."""
    heldout: int | None
    """Number of held-out documents that are continued instead."""
    goal: str
    """A modality, or "free"."""
    samples: int
    """Per prompt."""
    max_tokens: int | None
    sampling: Sampling
    guidance: float | None = None
    """Refused: see `check`."""
    prefill_rule: PrefillRule = "threshold"
    decode_rule: DecodeRule = "threshold"
    """Both: see pretrain/generation/rules.py."""

    def check(self) -> None:
        """Raise ConfigError for values that no model can serve."""
        if self.guidance is not None:
            raise ConfigError(
                f"--guidance {self.guidance:g}: classifier-free guidance compares logits with and without "
                "the condition, so it needs a model that was trained with dropped conditions, and runs drop "
                "none; leave it out"
            )
        if bool(self.parts) == (self.heldout is not None):
            raise ConfigError(
                "give a prompt (--prompt, --image, --speech; --prompt '' begins a document), or --heldout N "
                "for the beginnings of N held-out documents; one of both"
            )
        how, least_1 = self.sampling, "a whole number, 1 or more"
        for flag, value, legal, fits in (
            ("--heldout", self.heldout, least_1, self.heldout is None or self.heldout >= 1),
            ("--samples", self.samples, least_1, self.samples >= 1),
            ("--max-tokens", self.max_tokens, least_1, self.max_tokens is None or self.max_tokens >= 1),
            ("--top-k", how.top_k, least_1, how.top_k is None or how.top_k >= 1),
            ("--top-p", how.top_p, "more than 0, at most 1", 0 < how.top_p <= 1),
            ("--temperature", how.temperature, "0 (greedy) to 1000", 0 <= how.temperature <= 1000),
            ("--image-steps", how.image_steps, least_1, how.image_steps is None or how.image_steps >= 1),
            ("--seed", how.seed, "a whole number from 0 to 2^63 - 1", 0 <= how.seed < 2**63),
        ):
            if not fits:
                raise ConfigError(f"{flag} {value}: {legal}")


def generate(
    path: Path, request: Request, out: Path, tokenizers: Path | None = None, world: World | None = None
) -> None:
    """Write samples of a run, a checkpoint or a folder of weights into a new folder, whole or not at all.

    The same call writes the same bytes on one kind of processor. `world`: the ranks that share the model,
    which all call it; rank 0 writes. Raises ConfigError, and then there is no folder.
    """
    request.check()
    if out.exists():
        raise ConfigError(f"--out {out} exists; choose another folder, or remove it")
    model = open_model(path, tokenizers, world)
    grammar = _grammar(model, request)
    config, trained = model.decoder.config, model.routing_state
    rules = decoding_rules(config, trained, request.prefill_rule, request.decode_rule)
    prompts = _prompts(model, request, grammar)
    found = continue_prompts(
        model.decoder, [prompt.document for prompt in prompts], grammar, request.sampling, rules.decode,
        samples=request.samples, max_tokens=request.max_tokens, prompt_state=rules.prefill,
    )  # fmt: skip
    if not model.writes:
        return
    try:
        with atomic_folder(out) as writing:
            for name, content in _files(model, request, prompts, found, rules.told).items():
                with atomic_file(writing / name) as file:
                    file.write(content)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    tokens = sum(len(sample.ids) for of_prompt in found for sample in of_prompt)
    print(
        f"{out / 'index.html'}: {request.samples} samples of each of {len(prompts)} prompts, {tokens} tokens"
    )
    if rules.told is not None:
        print(rules.told)


def _grammar(model: TrainedModel, request: Request) -> Grammar:
    goals = (*model.vocabulary.modalities, FREE)
    if request.goal not in goals:
        raise ConfigError(
            f"--to {request.goal}: legal: {', '.join(goals)}{did_you_mean(request.goal, goals)}"
        )
    return model.grammar(request.goal)


def _prompts(model: TrainedModel, request: Request, grammar: Grammar) -> list[Prompt]:
    """The prompts, each of which leaves room for a sample. Raises ConfigError."""
    context, least = model.decoder.config.context_tokens, grammar.least_room()
    if request.max_tokens is not None and request.max_tokens < least:
        raise ConfigError(f"--max-tokens {request.max_tokens}: --to {request.goal} takes at least {least}")
    if request.heldout is None:
        prompt = prompt_of(request.parts, model.tokenizers)
        if room_behind(len(prompt.ids), context) < least:
            raise ConfigError(
                f"the prompt has {len(prompt.ids)} tokens, so that the context of {context} has no room for "
                f"the {least} that --to {request.goal} takes; shorten it"
            )
        return [prompt]
    if model.heldout is None:
        raise ConfigError("--heldout: the weights belong to no run with data.heldout; give a prompt")
    try:
        source = TokenSource.open(model.heldout)
    except ShardError as error:
        raise ConfigError(f"--heldout: {error}") from None
    return heldout_prompts(source, request.heldout, request.goal, context + 1 - least)


def _files(
    model: TrainedModel,
    request: Request,
    prompts: Sequence[Prompt],
    found: Sequence[Sequence[Document]],
    rules: str | None,
) -> dict[str, bytes]:
    """Name -> content of all files of a request: PPP_SS.txt of sample SS of prompt PPP, its pictures and
    sound PPP_SS_N.*, and index.html. `rules`: a line about them for the page."""
    files: dict[str, bytes] = {}
    shown = []
    for number, (prompt, of_prompt) in enumerate(zip(prompts, found, strict=True)):
        samples = [decode(sample, model.vocabulary, model.tokenizers) for sample in of_prompt]
        for sample, pieces in enumerate(samples):
            stem = f"{number:03d}_{sample:02d}"
            text, media = named_files(pieces, stem)
            files |= {f"{stem}.txt": f"{text}\n".encode(), **media}
        truth = None if prompt.truth is None else decode(prompt.truth, model.vocabulary, model.tokenizers)
        own = decode(prompt.document, model.vocabulary, model.tokenizers)
        shown.append(ShownPrompt(prompt.name, own, truth, samples))
    step = "" if model.source.step is None else f", step {model.source.step}"
    how = request.sampling
    about = [
        f"--to {request.goal}, temperature {how.temperature:g}, top-k {how.top_k or 'all'}, "
        f"top-p {how.top_p:g}, seed {how.seed}",
        *_image_lines(model, how),
        *([] if rules is None else [rules]),
    ]
    files["index.html"] = page(f"{model.source.name}{step}", about, shown).encode()
    return files


def _image_lines(model: TrainedModel, how: Sampling) -> list[str]:
    """How images of vectors were made, as a line for each modality."""
    found = denoising_of(model.decoder.config, model.vocabulary, how)
    return [f"{m}s in {len(of.times)} steps of {of.sampler}" for m, of in found.items()]
