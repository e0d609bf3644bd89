"""TokenizeConfig: what data.toml holds."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TextConfig(_Frozen):
    """sentencepiece BPE."""

    vocab_size: int = Field(2048, ge=512)
    """With the special tokens and 256 byte pieces."""


class ImageConfig(_Frozen):
    """A codebook of patches."""

    size_px: PositiveInt = 32
    """Pictures are brought to size_px x size_px; each gives (size_px / patch_px)^2 tokens."""
    patch_px: PositiveInt = 4
    fit: Literal["crop", "pad", "stretch"] = "crop"
    """How a picture of another size is brought to it: centre crop, black bars, or another aspect ratio."""
    num_codes: int = Field(512, ge=2)
    num_verbatim: NonNegativeInt = 32
    """Codes that are the commonest patches as they are; the others are k-means centres."""
    fit_patches: PositiveInt = 30_000
    """Distinct patches that k-means sees."""

    @model_validator(mode="after")
    def _check(self) -> "ImageConfig":
        if self.size_px % self.patch_px:
            raise ValueError(f"size_px = {self.size_px} is not a multiple of patch_px = {self.patch_px}")
        if self.num_verbatim > self.num_codes:
            raise ValueError(f"num_verbatim = {self.num_verbatim} is more than num_codes = {self.num_codes}")
        return self


class SpeechConfig(_Frozen):
    """k-means units of log-mel frames."""

    units_per_s: PositiveInt = 25
    frames_per_unit: PositiveInt = 2
    num_units: int = Field(256, ge=2)
    num_mels: int = Field(40, ge=8, le=128)
    merge_repeats: bool = True
    """A unit that lasts is one token; how long it lasts is lost, and decoded as its usual duration."""
    fit_units: PositiveInt = 60_000
    """Stretches of 1 / units_per_s seconds that k-means sees."""

    @model_validator(mode="after")
    def _check(self) -> "SpeechConfig":
        frames_per_s = self.units_per_s * self.frames_per_unit
        if 16_000 % frames_per_s or not 25 <= frames_per_s <= 400:
            raise ValueError(
                f"units_per_s * frames_per_unit = {frames_per_s} frames a second: must divide 16000 and lie "
                "in 25 .. 400"
            )
        return self


class TokenizeConfig(_Frozen):
    """Tokenizers, and how raw shards become token shards. Data holds only modalities that have a table."""

    text: TextConfig | None = None
    image: ImageConfig | None = None
    speech: SpeechConfig | None = None
    tokenizers_from: str | None = None
    """Folder of tokenizers to use (OUT/tokenizers of an earlier `motley tokenize`); none are fitted then."""
    fit_split: str = "train"
    """Sub-folder of SRC that tokenizers are fitted on; meaningless where SRC itself holds the shards."""
    fit_documents: PositiveInt = 6000
    """At most so many documents, from shards spread over the split."""
    seed: NonNegativeInt = 1
    raw_shards_per_shard: PositiveInt = 1
    """Raw shards that go into one token shard. Tokens are small: join many small raw shards."""
    max_bad_frac: float = Field(0.001, ge=0, le=1)
    """Documents that may be skipped as unusable before it is an error."""

    @model_validator(mode="after")
    def _check(self) -> "TokenizeConfig":
        tables = [name for name in ("text", "image", "speech") if getattr(self, name) is not None]
        if self.tokenizers_from is None and self.text is None:
            raise ValueError(
                "the table [text] is needed (it may be empty): its vocabulary holds the special tokens"
            )
        if self.tokenizers_from is not None and tables:
            raise ValueError(f"tokenizers_from brings its own settings; remove the tables {tables}")
        return self
