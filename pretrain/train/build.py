"""The parts of a run, made from its config."""

from dataclasses import replace
from functools import partial

from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.stream import Stream, StreamState
from parallel.partition import partition
from parallel.pipeline_engine import PipelineEngine
from parallel.world import World
from parallel.zero_engine import ZeroEngine
from pretrain.config import RunConfig
from pretrain.evaluation.document_sums import build_documents
from pretrain.evaluation.losses import Heldout, build_heldout
from pretrain.models.accounting import sublayer_costs
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.train.optimizer import parameter_groups
from pretrain.train.schedule import schedule_factor
from pretrain.weights.warm_start import initial_weights, load_weights


def engine(config: RunConfig, world: World) -> ZeroEngine:
    """The model, or this rank's stage of it, in the engine of the layout. Its weights are drawn from the
    seed, or those of `initial_weights`."""
    bounds = partition(sublayer_costs(config.model), world.pp_size, config.model.whole_blocks)
    decoder = Decoder(
        config.model,
        seed=config.seed,
        tp=world.tensor_parallel,
        activation_checkpointing=config.parallel.activation_checkpointing,
        sublayers=range(bounds[world.pp_rank], bounds[world.pp_rank + 1]),
    )
    if (folder := initial_weights(config)) is not None:
        load_weights(folder, decoder.named_parameters(), world)
    module, optimizer = Pretraining(decoder), config.optimizer

    def learning_rate_at(step: int) -> float:
        return optimizer.learning_rate * schedule_factor(step, config.num_steps, optimizer.schedule)

    per_pass = world.dp_size * config.parallel.micro_batch_sequences
    engine_of = ZeroEngine if world.pp_size == 1 else PipelineEngine
    return engine_of(
        module,
        parameter_groups(module.named_parameters(), optimizer, config.model),
        world,
        optimizer=optimizer.spec,
        max_grad_norm=optimizer.max_grad_norm,
        learning_rate_at=learning_rate_at,
        zero_stage=config.parallel.zero_stage,
        precision=config.precision,
        micro_batch_sequences=config.parallel.micro_batch_sequences,
        accumulation_steps=config.sequences_per_step // per_pass,
        prefix="decoder.",
    )


def loader(config: RunConfig, data: Stream, world: World, state: StreamState) -> Loader:
    """This rank's share of the data, from `state` on; its steps come with their ModelInputs."""
    return Loader(
        data,
        dp_rank=world.dp_rank,
        dp_size=world.dp_size,
        micro_batch_sequences=config.parallel.micro_batch_sequences,
        prefetch_steps=config.data.prefetch_steps,
        prepare=partial(
            build_inputs,
            config=config.model,
            document_mask=config.data.document_mask,
            modality_weights=config.modality_weights,
            formats=data.vocabulary.vectors,
        ),
        state=state,
    )


def heldout(config: RunConfig, world: World) -> Heldout:
    """This rank's share of the held-out set; empty if the run has none."""
    if config.data.heldout is None:
        return Heldout(config.model.modalities, (), {}, {})
    source = TokenSource.open(config.data.heldout, config.data.remote_in_training)
    heldout = build_heldout(config, source, dp_rank=world.dp_rank, dp_size=world.dp_size)
    last = build_documents(config, source, dp_rank=world.dp_rank, dp_size=world.dp_size)
    return replace(heldout, last=last)
