"""RunConfig, the config of a run, composed of the configs of its parts. This module imports no torch."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    field_validator,
    model_validator,
)

from data_pipeline.files.printable import hidden_characters
from data_pipeline.files.toml_config import ConfigError, apply_override, load_config, load_toml, validate
from data_pipeline.remote.location import GB, RemoteSettings, check_folder, without_queries
from parallel.layout import ParallelConfig, Precision, check_layout
from pretrain import parameter_settings
from pretrain.models.config import SHARED_TOWER, ModelConfig
from pretrain.optimizer_config import OptimizerConfig
from pretrain.run_files import CONFIG


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class SourceConfig(_Frozen):
    """A folder of token shards, or its URL, and its weight among the sources, of what DataConfig.weights_of
    says."""

    path: str
    weight: float = Field(1.0, gt=0)


class DataConfig(_Frozen):
    """The training and held-out data of a run."""

    removed: ClassVar[dict[str, str]] = {
        "max_bad_documents": "data.max_unreadable_frac says which share of the documents may be unreadable",
        "num_workers": "one thread reads ahead now, whose length data.prefetch_steps says",
    }

    train: tuple[SourceConfig, ...] = Field(min_length=1)
    weights_of: Literal["documents", "tokens"] = "documents"
    """What the weights of sources share out: the documents that are drawn, or their tokens, so that a source
    of documents twice as long as another's gives half as many for the same weight."""
    temperature: float | None = Field(None, ge=0.1, allow_inf_nan=False)
    """In the place of weights: a source with n documents, or tokens, has the weight n^(1 / temperature). 1 is
    in proportion to size; the higher, the closer to equal shares. None: weights are as they are written.
    Below 0.1 the weight of a large source would be no number."""
    heldout: str | None = None
    """Folder of token shards for evaluation, or its URL."""
    document_mask: bool = True
    """Whether attention stays within documents; False lets it cross the documents of a sequence."""
    prefetch_steps: NonNegativeInt = 2
    """Number of optimizer steps that a thread reads and packs ahead; 0: a step waits for its data."""
    max_unreadable_frac: float = Field(0.0, ge=0, le=1)
    """Share of the documents of `train` that may be unreadable, as in damaged shards, before the run ends."""
    max_too_long_frac: float = Field(0.01, ge=0, le=1)
    """Share of a source's documents that may be left out because an image, an utterance or another span in
    them is longer than the context; text is cut."""
    max_epochs: float = Field(4.0, gt=0)
    """Passes over a source beyond which the run warns at its start."""

    cache_dir: str | None = None
    """Folder of each node where shards of URLs are kept. None: one of this user where the node keeps
    temporary files (TMPDIR), which is a disk of its own; the run directory is shared by all nodes."""
    cache_gb: float = Field(20.0, gt=0, allow_inf_nan=False)
    """Most gigabytes (1e9 bytes) in cache_dir, over all runs and ranks of a node that share it."""
    retry_s: float = Field(120.0, ge=0, allow_inf_nan=False)
    """Seconds for which a fetch from a URL is tried again before the run ends."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All folders and URLs of data."""
        return (*(source.path for source in self.train), *([self.heldout] if self.heldout else []))

    @property
    def remote(self) -> RemoteSettings:
        """How a verb that reads a run fetches token shards behind URLs: no command is run."""
        folder = None if self.cache_dir is None else Path(self.cache_dir)
        return RemoteSettings(folder, int(self.cache_gb * GB), self.retry_s)

    @property
    def remote_in_training(self) -> RemoteSettings:
        """How a run fetches them; a `pipe:` that a person typed is run."""
        return dataclasses.replace(self.remote, runs_commands=True)

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        for path in self.paths:
            check_folder(path)
        weighted = [source.path for source in self.train if source.weight != 1]
        if self.temperature is not None and weighted:
            raise ValueError(
                f"temperature = {self.temperature:g} computes the weights of sources from their sizes, but "
                f"{weighted[0]} has a weight of its own; leave out either"
            )
        return self


class SpikeConfig(_Frozen):
    """Which steps are spikes, beside those whose loss or gradient is not finite, which always are."""

    loss_factor: float | None = Field(None, gt=1)
    """A step is a spike if its loss, as the objective weighs it, without z-loss and auxiliary losses, is more
    than this many times the median of the last `window` steps. None: no loss makes it one."""
    norm_factor: float | None = Field(None, gt=1)
    """The same of the norm of the gradient, before clipping."""
    window: PositiveInt = 50
    """Number of applied steps that a leap is measured by. Before there are so many, no step leaps."""
    max_spikes: PositiveInt = 10
    """Number of spikes in the whole run that are skipped or rolled back; one more ends it."""


class EveryStepsConfig(_Frozen):
    """Intervals in optimizer steps. The last step is always logged, evaluated and saved."""

    renamed: ClassVar[dict[str, str]] = {"conditional": "eval_conditional"}

    log: PositiveInt = 10
    eval: PositiveInt = 100
    eval_conditional: PositiveInt | None = None
    """Interval of conditional losses, which cost more than the held-out loss. None: the value of eval."""
    checkpoint: PositiveInt = 100
    samples: PositiveInt | None = None
    """Interval of what the model writes, draws and says behind fixed held-out prompts, for TensorBoard and a
    page. Training is the same with and without. None: there is none."""


class EvaluateConfig(_Frozen):
    """The amount of held-out data in an evaluation."""

    heldout_sequences: PositiveInt = 64
    conditional_documents: NonNegativeInt = 64
    """Held-out documents per direction (such as text -> image); 0 leaves conditional losses out."""
    generate: NonNegativeInt = 0
    """Held-out documents of the demo corpus, per direction, behind a part of which the model generates after
    the last step, so that facts are judged (pretrain/generation/facts.py). 0: none."""
    last_documents: PositiveInt | None = None
    """Held-out documents, such as 1_000, whose losses the last evaluation keeps, in documents.json. A
    comparison of runs that all have them judges by these documents, and its intervals hold the variance over
    documents too. None: the last evaluation is as all others."""


class RunConfig(_Frozen):
    """All that a run depends on."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: NonNegativeInt = 1
    total_tokens: PositiveInt
    tokens_per_step: PositiveInt
    """Slots of a global batch, padding included."""
    precision: Precision = "fp32"
    initial_weights: str | None = None
    """Folder of weights (from `motley import`) to begin with. None: weights are drawn from the seed."""
    runs_dir: str = "runs"
    keep_checkpoints: PositiveInt = 2
    on_failed_save: Literal["stop", "warn"] = "stop"
    """What a checkpoint that cannot be saved does: it ends the run, or the run says so, keeps the checkpoint
    before it and goes on. The last checkpoint of an attempt must be saved either way."""
    loss_weights: dict[str, float] = {}
    """Modality -> weight of its targets in the training objective, which is a weighted sum of losses over the
    sum of weights; a modality that is not named has 1. 0: its tokens are context alone. All losses in metrics
    are unweighted. Auxiliary losses of routers are divided by the sum of weights too. Of a modality of
    vectors: weight of its mean loss per image, which is added to the mean loss per id (Transfusion: 5)."""
    on_spike: Literal["stop", "skip", "rollback"] = "stop"
    """What a spike does: it ends the run, or its update is left out, or the run goes back to its last
    checkpoint and makes the steps since then again on later data (pretrain/train/spikes.py)."""
    keep_code_diff: bool = False
    """Whether record.json keeps the text of code changes that are not committed, which may hold secrets.
    Their hash and the names of the changed files are always kept."""
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    parallel: ParallelConfig = ParallelConfig()
    every_steps: EveryStepsConfig = EveryStepsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    spike: SpikeConfig = SpikeConfig.model_validate({})

    @field_validator("runs_dir")
    @classmethod
    def _is_shown(cls, runs_dir: str) -> str:
        if hidden_characters(runs_dir):
            raise ValueError("a folder's name takes no control characters; take them out")
        return runs_dir

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.tokens_per_step % self.model.context_tokens:
            raise ValueError(
                f"tokens_per_step = {self.tokens_per_step} is not a multiple of "
                f"model.context_tokens = {self.model.context_tokens}"
            )
        if self.num_steps < 1:
            raise ValueError(
                f"total_tokens = {self.total_tokens} is less than one step of "
                f"tokens_per_step = {self.tokens_per_step}"
            )
        schedule = self.optimizer.schedule
        if schedule.start_step + schedule.warmup_steps >= self.num_steps:
            behind = f" behind start_step = {schedule.start_step}" if schedule.start_step else ""
            raise ValueError(
                f"optimizer.schedule.warmup_steps = {schedule.warmup_steps}{behind} leaves no step "
                f"after warm-up: the run has {self.num_steps} (total_tokens // tokens_per_step)"
            )
        legal = (*self.model.tower_names, SHARED_TOWER)
        for tower in self.optimizer.towers:
            if tower not in legal:
                raise ValueError(f'optimizer.towers."{tower}": no such tower; legal: {", ".join(legal)}')
        for problem in parameter_settings.problems(self.optimizer, self.model):
            raise ValueError(problem)
        self._check_loss_weights()
        self._check_samples()
        if self.model.bidirectional and not self.data.document_mask:
            raise ValueError(
                f"data.document_mask = false with model.vectors.{self.model.bidirectional[0]}.bidirectional "
                "= true was never tried: set one of them the other way"
            )
        if self.evaluate.last_documents is not None and self.data.heldout is None:
            raise ValueError(
                f"evaluate.last_documents = {self.evaluate.last_documents} needs held-out documents; set "
                "data.heldout, or take it out"
            )
        return self

    def _check_loss_weights(self) -> None:
        for modality, weight in self.loss_weights.items():
            if modality not in self.model.modalities:
                raise ValueError(
                    f'loss_weights."{modality}": no such modality; legal: {", ".join(self.model.modalities)}'
                )
            if not 0 <= weight < math.inf:
                raise ValueError(f"loss_weights.{modality} = {weight}; legal: 0 or more, and finite")
            vectors = self.model.vectors.get(modality)
            if weight == 0 and vectors is not None and vectors.learns:
                raise ValueError(
                    f'loss_weights.{modality} = 0, but model.vectors.{modality}.objective is "'
                    f'{vectors.objective}": noise would hide {modality} from what follows, and nothing would '
                    'learn to remove it; set objective = "none" in its place, which is context without noise'
                )
            if vectors is not None and not vectors.learns:
                raise ValueError(
                    f"loss_weights.{modality} = {weight}, but model.vectors.{modality}.objective is "
                    '"none", without a loss; take it out'
                )
        if self.modality_weights is not None and not any(self.modality_weights):
            raise ValueError(
                "loss_weights gives every modality 0: nothing is left to learn; raise one of them"
            )

    def _check_samples(self) -> None:
        """Refuse keys that need a model which rank 0 can let speak."""
        keys = {"every_steps.samples": self.every_steps.samples, "evaluate.generate": self.evaluate.generate}
        for key, value in keys.items():
            if not value:
                continue
            layout = self.parallel
            if layout.tp > 1 or layout.pp > 1 or layout.zero_stage == 3:
                raise ValueError(
                    f"{key} = {value} with parallel.tp = {layout.tp}, pp = {layout.pp}, zero_stage = "
                    f"{layout.zero_stage}: rank 0 samples, so it must hold all weights: tp = 1, pp = 1, "
                    "zero_stage 0 to 2; or leave the key out and call `motley generate` on a checkpoint"
                )
            if self.data.heldout is None:
                raise ValueError(f"{key} = {value}: prompts are held-out documents; set data.heldout")
            if not self.model.has_causal_form:
                raise ValueError(
                    f"{key} = {value}: a gate of model.depth sees later tokens, which do not exist while a "
                    "token is written; take another gate, such as tanh, or leave the key out"
                )
        unlearned = set(self.model.vectors) - set(self.model.learned_vectors)
        if self.evaluate.generate and unlearned:
            modality = min(unlearned)
            raise ValueError(
                f"evaluate.generate judges what the model draws, but model.vectors.{modality}.objective = "
                '"none" makes it context alone; leave evaluate.generate out, or set another objective'
            )
        if self.evaluate.generate == 1:
            raise ValueError("evaluate.generate = 1; legal: 0 (none), or 2 and more documents")

    @property
    def modality_weights(self) -> tuple[float, ...] | None:
        """Weight of each modality's targets in the objective, in the model's order of modalities; None if all
        are 1."""
        weights = tuple(self.loss_weights.get(modality, 1.0) for modality in self.model.modalities)
        return None if all(weight == 1 for weight in weights) else weights

    @property
    def image_weights(self) -> dict[str, float]:
        """Modality of vectors with a loss -> weight of its mean loss per image beside the mean loss per
        id."""
        return {modality: self.loss_weights.get(modality, 1.0) for modality in self.model.learned_vectors}

    @property
    def num_steps(self) -> int:
        """Number of optimizer steps in the run."""
        return self.total_tokens // self.tokens_per_step

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.model.context_tokens

    @property
    def run_dir(self) -> Path:
        """The directory that the run writes."""
        return Path(self.runs_dir) / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The RunConfig of a TOML file, or of a run's directory, and `key=value` overrides. A directory may have
    moved since the run began. Raises ConfigError with file, field and fix."""
    folder = Path(path)
    if not folder.is_dir():
        return load_config(RunConfig, path, overrides)
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{folder} is a folder without {CONFIG}: no run has begun there; name a run file")
    folder = folder.resolve() if folder.name in ("", "..") else folder
    values = load_toml(folder / CONFIG) | {"runs_dir": str(folder.parent), "name": folder.name}
    for override in overrides:
        apply_override(values, override)
    return validate(RunConfig, values, source=str(folder / CONFIG))


def check_run_layout(config: RunConfig, world_size: int) -> None:
    """Raise ConfigError, with all problems at once, if the layout is not legal on `world_size` ranks."""
    if not config.optimizer.takes(config.parallel.zero_stage):
        raise ConfigError(
            'optimizer.kind = "muon" with parallel.zero_stage = 3: stage 3 cuts every matrix over all ranks, '
            "so each step would gather every update; set parallel.zero_stage = 0, 1 or 2"
        )
    try:
        check_layout(
            config.parallel,
            config.model,
            world_size=world_size,
            sequences_per_step=config.sequences_per_step,
            precision=config.precision,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def differences(ours: BaseModel, theirs: BaseModel) -> list[tuple[str, Any, Any]]:
    """(dotted key, our value, their value) of all keys in which two configs differ.

    The query of a URL, which may be a signature and expire, makes no difference and stands in no value.
    """

    def public(value: Any) -> Any:
        if isinstance(value, list):
            return [public(item) for item in value]
        if isinstance(value, dict):
            return {key: public(item) for key, item in value.items()}
        return without_queries(value) if isinstance(value, str) else value

    def flatten(value: Any, prefix: str) -> dict[str, Any]:
        if isinstance(value, dict) and value:
            return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}{key}.").items()}
        return {prefix.rstrip("."): public(value)}

    a, b = (flatten(config.model_dump(mode="json"), "") for config in (ours, theirs))
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def is_legal(config: RunConfig, world_size: int) -> bool:
    """Whether the layout of the run is legal on `world_size` ranks."""
    try:
        check_run_layout(config, world_size)
    except ConfigError:
        return False
    return True
