"""Samples of a run while it trains: what its model writes, draws and says behind fixed held-out prompts.

Rank 0 makes them with the weights that it trains. It draws by random numbers of its own, so training is the
same with and without. They are shown in TensorBoard and on a page of the run directory; after the last step,
facts of the demo corpus are judged if evaluate.generate asks for it.
"""

from collections.abc import Mapping, Sequence

from data_pipeline.files.atomic import atomic_file
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.tokenizer_set import vocabulary_of
from parallel.zero_engine import ZeroEngine
from pretrain.config import RunConfig
from pretrain.evaluation.losses import routing_states
from pretrain.generation.continuation import continue_prompts
from pretrain.generation.facts import fact_row, judge_facts
from pretrain.generation.page import ShownPrompt, page
from pretrain.generation.pieces import Piece, decode, named_files
from pretrain.generation.prompts import Prompt, first_prompts, part_prompts
from pretrain.generation.sampling import Sampling
from pretrain.generation.trained_model import TrainedModel
from pretrain.models.decoder import Decoder
from pretrain.run_files import SAMPLES
from pretrain.run_tokenizers import tokenizers_of_run
from pretrain.tensorboard_view import TensorBoardView
from pretrain.train.loop import Sample, is_due
from pretrain.train.state import TrainState
from pretrain.weights.folder import LazyTensor, WeightSource

PROMPTS = 2
"""Prompts per modality, as far as there are so many."""
MOST_TOKENS = 192
"""Ids of a sample at most, where its modality has no fixed number."""

Prompts = Mapping[str, Sequence[Prompt]]
"""Modality of the samples -> their prompts."""


def sampler(config: RunConfig) -> Sample:
    """Return the function that makes the samples of a run. Raises ConfigError, as `check_run` did, if there
    are no tokenizers."""
    assert config.data.heldout is not None
    tokenizers = tokenizers_of_run(config.run_dir, config, None)
    vocabulary = vocabulary_of(tokenizers)
    heldout = TokenSource.open(config.data.heldout, config.data.remote_in_training)

    def sample(engine: ZeroEngine, state: TrainState, view: TensorBoardView) -> dict[str, float]:
        decoder: Decoder = engine.deepspeed.module.decoder
        tensors = {name: LazyTensor(tuple(p.shape), p.detach) for name, p in decoder.named_parameters()}
        source = WeightSource(
            config.run_dir, config.model, tensors, config.name, state.step, vocabulary.sizes
        )
        rule = routing_states(config.model, state.thresholds, state.step / config.num_steps)[-1][1]
        model = TrainedModel(source, decoder, tokenizers, vocabulary, rule, config.data.heldout)
        decoder.eval()  # nothing is dropped from samples
        try:
            return _shown_and_judged(config, model, heldout, state, view)
        finally:
            decoder.train()

    return sample


def _shown_and_judged(
    config: RunConfig, model: TrainedModel, heldout: TokenSource, state: TrainState, view: TensorBoardView
) -> dict[str, float]:
    """Show samples and judge facts, as far as they are due; metrics of facts."""
    every = config.every_steps.samples
    if every and is_due(config, state, every):
        try:
            show(config, model, fixed_prompts(model, heldout), state.step, view)
        except Exception as error:  # a run does not end because a view of it fails
            print(f"step {state.step}: samples are not shown: {type(error).__name__}: {error}", flush=True)
    if not config.evaluate.generate or state.step < config.num_steps:
        return {}
    train = TokenSource.open(config.data.train[0].path, config.data.remote_in_training)
    documents, sampling = config.evaluate.generate, Sampling(seed=config.seed)
    return fact_row(judge_facts(model, train, heldout, documents=documents, sampling=sampling))


def fixed_prompts(model: TrainedModel, heldout: TokenSource) -> Prompts:
    """Of the first held-out documents, a text as prompt of every other modality, and the first of these as
    prompt of text; where no document holds both, documents that are cut."""
    context, (_, *others) = model.decoder.config.context_tokens, model.vocabulary.modalities
    parts = part_prompts(heldout, PROMPTS, context)
    prompts = {}
    for modality in model.vocabulary.modalities:
        if modality in model.context_only:
            continue
        most = context + 1 - model.grammar(modality).least_room()
        before = TEXT if modality != TEXT else next(iter(others), TEXT)
        own = [prompt for prompt in parts.get((before, modality), ()) if len(prompt.ids) <= most]
        prompts[modality] = own or first_prompts(heldout, PROMPTS, modality, most)
    return prompts


def show(config: RunConfig, model: TrainedModel, prompts: Prompts, step: int, view: TensorBoardView) -> None:
    """Write the page of a step, and what is on it into TensorBoard."""
    shown = []
    for modality, own in prompts.items():
        if not own:
            continue
        grammar = model.grammar(modality)
        samples = continue_prompts(
            model.decoder, [prompt.document for prompt in own], grammar, Sampling(seed=config.seed),
            model.routing_state, samples=1, max_tokens=max(MOST_TOKENS, grammar.least_room()),
        )  # fmt: skip
        for number, (prompt, (sample,)) in enumerate(zip(own, samples, strict=True)):
            parts = [
                decode(each, model.vocabulary, model.tokenizers)
                for each in (prompt.document, prompt.truth, sample)
                if each is not None
            ]
            shown.append(ShownPrompt(f"{modality} behind {prompt.name}", parts[0], parts[1], [parts[-1]]))
            _into_tensorboard(view, step, f"samples/{modality}/{number}", parts[0], parts[-1])
    folder = config.run_dir / SAMPLES
    folder.mkdir(exist_ok=True)
    about = [f"Step {step} of {config.num_steps}; temperature 1, seed {config.seed}"]
    with atomic_file(folder / f"step_{step:08d}.html") as file:
        file.write(page(f"{config.name}, step {step}", about, shown).encode())


def _into_tensorboard(
    view: TensorBoardView, step: int, name: str, prompt: Sequence[Piece], sample: Sequence[Piece]
) -> None:
    """The pictures and sounds of a sample, and its text beside the prompt's."""
    for piece in sample:
        if piece.suffix == "png":
            view.png(step, name, piece.file)
        elif piece.suffix == "wav":
            view.sound(step, name, piece.file)
    texts = [named_files(pieces, stem)[0] for pieces, stem in ((prompt, "prompt"), (sample, "sample"))]
    view.text(step, f"{name}/text", f"**prompt:** {texts[0]}\n\n**sample:** {texts[1]}")
