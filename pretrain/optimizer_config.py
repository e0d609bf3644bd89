"""The part of a run's config that optimizers and schedules read. This module imports no torch."""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

from parallel.adamw import adamw
from parallel.muon import MuonSettings, muon
from parallel.optimizer import OptimizerSpec
from parallel.weight_average import with_average


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScheduleConfig(_Frozen):
    """The factor on the learning rate over the run: a linear warm-up, then one of five shapes."""

    kind: Literal["cosine", "linear", "exponential", "wsd", "constant"] = "cosine"
    """linear: equal differences from step to step. exponential: equal ratios. Both go on from the warm-up to
    the last step, as cosine does. wsd: no change until the last steps, then linear."""
    warmup_steps: NonNegativeInt = 0
    min_factor: float = Field(default=0.1, ge=0, le=1)
    """The factor at the last step, for all kinds but constant."""
    decay_frac: float = Field(default=0.2, gt=0, le=1)
    """Share of the steps in which wsd decays linearly."""
    start_step: NonNegativeInt = 0
    """Steps before the schedule, which the run or its trunk made under another one. Warm-up and shape are of
    the steps behind them."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.kind == "exponential" and self.min_factor == 0:
            raise ValueError(
                'min_factor = 0 with kind = "exponential": equal ratios never reach 0; set min_factor above '
                '0, such as 0.01, or kind = "linear"'
            )
        return self


class TowerOptimizerConfig(_Frozen):
    """Settings of the optimizer for the weights of one tower."""

    renamed: ClassVar[dict[str, str]] = {"learning_rate_factor": "lr_scale"}

    lr_scale: float = Field(1.0, gt=0)
    """Factor on the learning rate."""
    weight_decay: float | None = Field(None, ge=0)
    """None: optimizer.weight_decay is used."""
    frozen: bool = False


class ParameterGroupConfig(_Frozen):
    """Settings of the optimizer for the parameters whose names match a pattern: a table of
    [[optimizer.groups]]. A key that is left out changes nothing."""

    match: str = Field(min_length=1)
    """Pattern of whole logical names, in which * stands for any text: "*.router.weight.*" is all routers of
    experts, "embedding.*" the embedding, "blocks.0.*" the first block."""
    lr_scale: float | None = Field(None, gt=0)
    """Factor on the learning rate, in place of that of the tower."""
    weight_decay: float | None = Field(None, ge=0)
    frozen: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> "ParameterGroupConfig":
        if self.lr_scale is None and self.weight_decay is None and self.frozen is None:
            raise ValueError(f'"{self.match}" sets nothing; add lr_scale, weight_decay or frozen')
        return self


class MuonConfig(_Frozen):
    """Settings of Muon for the matrices of blocks: attention and feed-forward of towers and experts."""

    learning_rate: float | None = Field(None, gt=0)
    """None: optimizer.learning_rate."""
    weight_decay: float | None = Field(None, ge=0)
    """None: optimizer.weight_decay."""
    momentum: float = Field(0.95, ge=0, lt=1)
    nesterov: bool = True
    ns_steps: int = Field(5, ge=1, lt=100)
    """Iterations of Newton-Schulz."""
    eps: float = Field(1e-7, gt=0)
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """Factor on the rate of an [m, n] matrix. match_rms_adamw: 0.2 sqrt(max(m, n)), so that rates tuned for
    AdamW carry over (arXiv 2502.16982). original: sqrt(max(1, m / n)), for rates such as 0.02."""
    qkv: Literal["parts", "heads", "fused"] = "parts"
    """What is orthogonalised by itself: queries, keys and values; every head of them; or all as one matrix.
    Gate and up are always apart."""


class OptimizerConfig(_Frozen):
    """Settings of AdamW, which Muon may relieve of matrices. Weights of norms are never decayed."""

    renamed: ClassVar[dict[str, str]] = {"clip_norm": "max_grad_norm"}

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices of blocks, and AdamW for embedding, head, norms, biases and routers."""
    learning_rate: float = Field(gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    schedule: ScheduleConfig = ScheduleConfig()
    towers: dict[str, TowerOptimizerConfig] = {}
    """Settings by tower; "shared" names the weights that towers share: tied parts, and embedding and head
    unless they are untied."""
    groups: tuple[ParameterGroupConfig, ...] = ()
    """Settings by name. The last table that matches a parameter wins over earlier ones and over `towers`."""
    muon: MuonConfig = MuonConfig.model_validate({})
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay per update of an exponential moving average of the weights, which is evaluated and saved beside
    them. None: there is none."""

    @model_validator(mode="after")
    def _check(self) -> "OptimizerConfig":
        if self.kind != "muon" and self.muon != MuonConfig.model_validate({}):
            raise ValueError(f'muon is set, but kind = "{self.kind}"; set kind = "muon", or leave muon out')
        return self

    def takes(self, zero_stage: int) -> bool:
        """Whether the optimizer works on parameters as the ZeRO stage holds them."""
        return self.kind == "adamw" or zero_stage < 3

    @property
    def spec(self) -> OptimizerSpec:
        """The optimizer as engines, checkpoints and plans know it."""
        numbers = {"beta1": self.beta1, "beta2": self.beta2, "eps": self.eps}
        if self.kind == "adamw":
            spec = adamw(**numbers)
        else:
            shared = self.muon.model_dump(include=set(MuonSettings.__dataclass_fields__))
            spec = muon(MuonSettings(**shared), **numbers)
        return spec if self.ema_decay is None else with_average(spec, self.ema_decay)
