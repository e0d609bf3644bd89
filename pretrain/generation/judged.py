"""`motley evaluate RUN`: losses of a trained model on any folder of token shards, and facts of the demo
corpus in what it generates."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.tar import ShardError
from pretrain.config import RunConfig, load
from pretrain.data_manifest import data_manifest, data_name
from pretrain.evaluation.losses import build_heldout, conditional_losses, heldout_losses, routing_states
from pretrain.generation.facts import describe_facts, fact_row, judge_facts
from pretrain.generation.sampling import Sampling
from pretrain.generation.trained_model import load_decoder, open_model
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState
from pretrain.run_files import CONFIG
from pretrain.train.checks import open_tokens
from pretrain.weights.folder import WeightSource
from pretrain.weights.sources import open_source, run_of


@dataclass(frozen=True)
class Judgement:
    """A request to judge a model."""

    sampling: Sampling
    """Of what is generated to judge its facts."""
    data: Path | None = None
    """Folder of token shards; None: the held-out data of the run."""
    sequences: int | None = None
    """Sequences of the held-out loss; None: as many as the run's evaluations."""
    conditional: int | None = None
    """Documents per direction of conditional losses; None: as many as the run's evaluations."""
    facts: int = 0
    """Documents per direction whose facts are judged; 0: none."""

    def check(self) -> None:
        """Raise ConfigError for values that no model can serve."""
        temperature, seed = self.sampling.temperature, self.sampling.seed
        for flag, value, legal, fits in (
            ("--sequences", self.sequences, "1 or more", self.sequences is None or self.sequences >= 1),
            ("--conditional", self.conditional, "0 or more", (self.conditional or 0) >= 0),
            ("--facts", self.facts, "0 (none), or 2 or more", self.facts == 0 or self.facts >= 2),
            ("--temperature", temperature, "0 (greedy) to 1000", 0 <= temperature <= 1000),
            ("--seed", seed, "a whole number from 0 to 2^63 - 1", 0 <= seed < 2**63),
        ):
            if not fits:
                raise ConfigError(f"{flag} {value}: {legal}")


@dataclass(frozen=True)
class LocalEngine:
    """Evaluates a whole decoder in this process; see Evaluates (pretrain/evaluation/losses.py)."""

    decoder: Decoder

    @torch.no_grad()
    def eval_step(self, micro_batches: Sequence[ModelInputs]) -> tuple[list[float], RouterReport]:
        module, device = Pretraining(self.decoder), next(self.decoder.parameters()).device
        results = [module(batch.to(device)) for batch in micro_batches]
        report = results[0][2]
        for _, _, more in results[1:]:
            report = report + more
        return torch.stack([stats.double() for _, stats, _ in results]).sum(dim=0).tolist(), report


def evaluate(path: Path, asked: Judgement, out: Path | None, tokenizers: Path | None = None) -> None:
    """Print losses, and facts if they are asked for, of a run or one of its checkpoints; `out`: a JSON file
    to write too. Raises ConfigError, and then writes nothing."""
    asked.check()
    if out is not None and out.exists():
        raise ConfigError(f"--out {out} exists; choose another file, or remove it")
    path = load(path).run_dir if path.is_file() else path
    run = run_of(path)
    if run is None:
        raise ConfigError(
            f"{path}: losses and facts are those of a run or its checkpoint, whose config says how documents "
            "are packed and tokens are chosen; name the run directory, or give --choices FILE"
        )
    config = load(run / CONFIG)
    data = _open_data(config, asked.data)
    scores = {}
    if asked.facts:
        model = open_model(path, tokenizers)
        source, decoder = model.source, model.decoder
        train = open_tokens(config, "data.train[0].path", config.data.train[0].path)
        scores = judge_facts(model, train, data, documents=asked.facts, sampling=asked.sampling)
    else:
        source = open_source(path)
        decoder = load_decoder(source, config.precision)
    row, fingerprint = losses(decoder, source, config, data, asked)
    if out is not None:
        found = {"model": str(source.path), "step": source.step, "data": str(data.folder)}
        found |= {"heldout_fingerprint": fingerprint, "seed": asked.sampling.seed}
        found |= {"temperature": asked.sampling.temperature, "metrics": row | fact_row(scores)}
        try:
            with atomic_file(out) as file:
                file.write((json.dumps(found, indent=1) + "\n").encode())
        except OSError as error:
            raise ConfigError(f"--out {out}: cannot be written: {error.strerror}") from None
    lines = [f"{name} {value:.4f}" for name, value in row.items()] + describe_facts(scores)
    print("\n  ".join([f"{source.path} on {data.folder}:", *lines]))


def _open_data(config: RunConfig, folder: Path | None) -> TokenSource:
    """The token shards that a model is judged on. Raises ConfigError for ids that the model does not know."""
    if folder is None and config.data.heldout is None:
        raise ConfigError("the run has no data.heldout; name a folder of token shards with --data DIR")
    data = open_tokens(config, "--data" if folder else "data.heldout", str(folder or config.data.heldout))
    train = data_name(config)
    try:
        made_by = data_manifest(config)["tokenizers"]
    except ShardError:
        print(f"{train} is not there: whether its tokenizers made the ids of {data.folder} is not known")
        return data
    for modality, entry in made_by.items():
        own = data.fingerprints.get(modality)
        if own != entry["fingerprint"]:
            raise ConfigError(
                f"{data.folder}: its {modality} was made by tokenizer {own}, but the model was trained on "
                f"that of {entry['fingerprint']} ({train}); tokenize it with tokenizers_from of that data"
            )
    return data


def losses(
    decoder: Decoder, source: WeightSource, config: RunConfig, data: TokenSource, asked: Judgement
) -> tuple[dict[str, float], str | None]:
    """(held-out and conditional losses by name, as a run's evaluations name them; hash of all ids that were
    read)."""
    amounts = {"heldout_sequences": asked.sequences, "conditional_documents": asked.conditional}
    given = {name: value for name, value in amounts.items() if value is not None}
    config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=given)})
    heldout, engine = build_heldout(config, data, dp_rank=0, dp_size=1), LocalEngine(decoder)
    row: dict[str, float] = {}
    state = source.routing_state or RoutingState()
    for prefix, rule in routing_states(config.model, state.thresholds, state.progress):
        row |= heldout_losses(engine, heldout, prefix, rule)
        row |= conditional_losses(engine, heldout, prefix, rule)
    if not row:
        raise ConfigError(f"{data.folder}: no document fits the context of {config.model.context_tokens}")
    return row, heldout.fingerprint
