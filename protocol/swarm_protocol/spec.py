"""`RunSpec`: everything that defines a run. Its canonical hash is the run id.

A run owner writes a `RunConfig` in TOML; `swarm-coordinator init` seals it, together with the hashes of the corpus and
of checkpoint 0, the coordinator's key and the end of the beacon chain, into a `RunSpec`. Nothing in it changes afterwards.
"""

from __future__ import annotations

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from swarm_protocol import PROTOCOL_VERSION, encoding
from swarm_protocol.errors import ConfigurationError

MAX_SPEC_BYTES = 1 << 16
MAX_PARAMETERS = 1 << 31

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A 32-byte BLAKE3 hash or Ed25519 public key, in lower-case hex."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class ModelSpec(_Section):
    """A Llama decoder, with the names of a Hugging Face `LlamaConfig`."""

    vocab_size: int = Field(256, ge=2, le=1 << 20)
    hidden_size: int = Field(128, ge=8, le=16384)
    intermediate_size: int = Field(352, ge=8, le=65536)
    num_hidden_layers: int = Field(2, ge=1, le=256)
    num_attention_heads: int = Field(4, ge=1, le=256)
    num_key_value_heads: int = Field(2, ge=1, le=256)
    max_position_embeddings: int = Field(128, ge=8, le=1 << 17)
    rope_theta: float = Field(10000.0, ge=1.0, le=1e9)
    rms_norm_eps: float = Field(1e-5, ge=1e-8, le=1e-2)
    tie_word_embeddings: bool = True
    initializer_range: float = Field(0.02, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("hidden_size / num_attention_heads must be even, for rotary embeddings")
        if self.num_parameters > MAX_PARAMETERS:
            raise ValueError(
                f"the model has {self.num_parameters:,} parameters; at most {MAX_PARAMETERS:,} are allowed"
            )
        return self

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        d, f, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        per_layer = 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d
        heads = 1 if self.tie_word_embeddings else 2
        return heads * self.vocab_size * d + self.num_hidden_layers * per_layer + d

    def num_trainable(self, trainable: TrainableSpec) -> int:
        """Elements of what is trained."""
        d, f, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        if trainable.kind == "all":
            return self.num_parameters
        if trainable.kind == "norms":
            return (2 * self.num_hidden_layers + 1) * d
        outputs_and_inputs = {
            "q_proj": d + d, "k_proj": kv + d, "v_proj": kv + d, "o_proj": d + d,
            "gate_proj": f + d, "up_proj": f + d, "down_proj": d + f,
        }  # fmt: skip
        return self.num_hidden_layers * trainable.r * sum(outputs_and_inputs[name] for name in trainable.targets)

    @property
    def flops_per_token(self) -> int:
        """Operations of training on one token, as is usual to count them: 6 N + 12 L H Q T (PaLM, appendix B)."""
        attention = (
            12 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * self.max_position_embeddings
        )
        return 6 * self.num_parameters + attention


Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class TrainableSpec(_Section):
    """What is trained: the whole model, its gains, or adapters of low rank on some matrices (LoRA, Hu et al. 2021).

    Where it is not the whole model, the rest is the trunk: fetched once by its root, and never sent again.
    """

    kind: Literal["all", "norms", "lora"] = "all"
    r: int = Field(8, ge=1, le=1024, description="rank of the adapters (lora)")
    alpha: int = Field(16, ge=1, le=1 << 16, description="an adapter counts alpha / r times (lora)")
    targets: Annotated[tuple[Target, ...], Strict(False)] = Field(
        ("q_proj", "v_proj"), min_length=1, max_length=7, description="the matrices that have adapters (lora)"
    )

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: object) -> object:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.targets)) != len(self.targets):
            raise ValueError("targets names a matrix twice")
        return self


def _require_optimizer(trainable: TrainableSpec, training: TrainingSpec) -> None:
    if trainable.kind != "all" and training.optimizer.name != "adamw":
        raise ValueError(
            f'trainable = "{trainable.kind}" needs training.optimizer.name = "adamw": Muon is for whole matrices'
        )


class ParentSpec(_Section):
    """The checkpoint of another run that this one starts from: what round `round` of it began with."""

    run: Hash
    round: int = Field(ge=0, lt=1 << 31)
    root: Hash


class DataConfig(_Section):
    """How a corpus becomes shards of tokens."""

    tokenizer: str = Field("bytes", description="'bytes', or the path of a Hugging Face tokenizer.json")
    shard_tokens: int = Field(1 << 18, ge=1 << 10, le=1 << 26)
    held_out_fraction: float = Field(0.02, gt=0.0, le=0.5)
    held_out_windows: int = Field(64, ge=1, le=1 << 16, description="windows per evaluation of a checkpoint")


class DataSpec(_Section):
    root: Hash
    tokenizer: str = Field(description="'bytes', or the hash of the tokenizer.json that is served with the data")
    train_tokens: int = Field(ge=1)
    held_out_windows: int = Field(ge=1, le=1 << 16)


class OptimizerSpec(_Section):
    """The inner optimizer. Its state is fresh each round; `warmup_steps` counts within the round.

    `muon` applies to the matrices of the decoder layers; everything else is AdamW with `adamw_lr`.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: float = Field(0.03, gt=0.0, le=10.0, description="Muon's, or AdamW's where that is all there is")
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="Muon's Nesterov momentum")
    newton_schulz_steps: int = Field(5, ge=1, le=12)
    adamw_lr: float = Field(3e-3, gt=0.0, le=10.0, description="for what Muon does not cover")
    beta1: float = Field(0.9, ge=0.0, lt=1.0)
    beta2: float = Field(0.95, ge=0.0, lt=1.0)
    eps: float = Field(1e-6, ge=1e-8, le=1e-2, description="below 1e-6 honest replays become noisy")
    weight_decay: float = Field(0.0, ge=0.0, le=1.0)
    warmup_steps: int = Field(5, ge=0, le=10_000)
    clip_norm: float = Field(1.0, gt=0.0, le=1e6)


class TrainingSpec(_Section):
    batch_sequences: int = Field(8, ge=1, le=1 << 14, description="sequences per inner step")
    micro_sequences: int = Field(
        8, ge=1, le=1 << 14, description="sequences per micro-batch; must divide batch_sequences"
    )
    steps: int = Field(
        20, ge=1, le=10_000, description="inner steps per round (H); the most where fixed_steps is false"
    )
    fixed_steps: bool = Field(True, description="every slot does exactly `steps`, however fast it is")
    segment_steps: int = Field(5, ge=1, le=10_000, description="inner steps between two committed states")
    precision: Literal["float32"] = "float32"
    limbs: int = Field(2, ge=2, le=3, description="7-bit limbs per operand of a product (exact)")
    grain_sequences: int | None = Field(
        None, ge=1, le=1 << 14, description="sequences per grain (exact); by default the fewest that hold 2,048 tokens"
    )
    optimizer: OptimizerSpec = OptimizerSpec()

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
        if self.batch_sequences % self.micro_sequences:
            raise ValueError("batch_sequences must be a multiple of micro_sequences")
        return self


class OuterSpec(_Section):
    """Nesterov on the averaged pseudo-gradient, in the exact domain (DiLoCo, Douillard et al. 2023, section 2)."""

    lr: float = Field(1.0, gt=0.0, le=10.0)
    momentum: float = Field(0.3, ge=0.0, lt=1.0)


class ExchangeSpec(_Section):
    parts: int = Field(8, ge=1, le=1 << 16, description="if left out, init chooses by the model's size")
    codec: Literal["none", "int8", "int4"] = "int4"
    aggregator: Literal["mean", "trimmed_mean", "median", "multi_krum", "geometric_median", "centered_clip"] = (
        "multi_krum"
    )
    trim_fraction: float = Field(
        0.2, ge=0.0, lt=0.5, description="share of the slots that trimmed_mean leaves out at either end"
    )
    clip_radius: float = Field(
        1.0,
        ge=0.01,
        le=100.0,
        description="radius of centered_clip over the typical distance of slots from their centre",
    )
    max_norm: float = Field(1e4, gt=0.0, le=1e12, description="L2 bound of an averaged part; one above it is missing")
    weight_cap_tokens: int = Field(1 << 20, ge=1, le=1 << 24, description="a slot weighs at most this many tokens")
    reducer_percent: int = Field(
        50, ge=1, le=100, description="of the parts that one reducer gets at most, where there are enough reducers"
    )
    weight_after: int = Field(0, ge=0, le=1000, description="accepted contributions before an identity has weight (k)")


class RoundsSpec(_Section):
    count: int = Field(6, ge=1, le=1_000_000)
    min_nodes: int = Field(1, ge=1, le=10_000)
    max_nodes: int = Field(256, ge=1, le=10_000)
    presence_s: float = Field(30.0, ge=1.0, le=3600.0, description="a node not heard of for this long is gone")
    assemble_s: float = Field(
        15.0, ge=0.0, le=3600.0, description="how long to wait for more nodes once enough are ready"
    )
    train_s: float = Field(120.0, ge=1.0, le=86400.0)
    exchange_s: float = Field(60.0, ge=1.0, le=86400.0)
    open_s: float = Field(10.0, ge=0.1, le=3600.0)
    keep_rounds: int = Field(4, ge=1, le=1000, description="rounds for which nodes keep inputs and evidence")
    snapshot_every: int = Field(
        10,
        ge=1,
        le=10_000,
        description="rounds between checkpoints that are kept whole; the others are made from averages",
    )

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.min_nodes > self.max_nodes:
            raise ValueError("min_nodes must not exceed max_nodes")
        return self


class AuditSpec(_Section):
    probation: int = Field(
        10, ge=0, le=1000, description="contributions of full size that are audited whole before an identity is trusted"
    )
    floor: float = Field(0.02, ge=0.0, le=1.0, description="least share of a trusted identity's contributions audited")
    budget: float = Field(
        1.0, gt=0.0, le=1.0, description="share of a round's training that audits may replay; the lowest draws go first"
    )
    reductions: float = Field(
        0.05,
        ge=0.0,
        le=1.0,
        description="share of the averages by reducers beyond probation that are audited, on probation all; 0: none at all",
    )
    horizon: int = Field(
        20, ge=1, le=10_000, description="rounds for which credit is pending, and forfeited by a reject"
    )
    accept: float = Field(1e-4, gt=0.0, lt=1.0, description="relative L2 distance up to which a replay agrees (native)")
    reject: float = Field(3e-4, gt=0.0, lt=10.0, description="relative L2 distance above which it disagrees (native)")
    evidence_s: float = Field(60.0, ge=1.0, le=86400.0, description="time a node has to serve its evidence")
    rejecting_auditors: int = Field(2, ge=1, le=10, description="auditors that must agree before anything is rejected")
    max_unavailable: int = Field(3, ge=1, le=1000, description="unavailable audits that end an identity's standing")
    unavailable_window: int = Field(20, ge=1, le=10_000, description="rounds within which these have to fall")
    tolerance_file: Hash | None = Field(None, description="hash of the calibrated tolerances (native)")

    @model_validator(mode="after")
    def _band_fits(self) -> Self:
        if self.accept > self.reject:
            raise ValueError("accept must not exceed reject")
        return self


class RunConfig(_Section):
    """What the run owner writes, in TOML."""

    name: str = Field("demo", min_length=1, max_length=64, pattern=r"^[\w .:-]+$")
    seed: int = Field(0, ge=0, lt=1 << 63)
    numerics: Literal["native", "exact"] = Field(
        "exact",
        description="exact: the inner steps give the same bits anywhere, and audits compare hashes; native: torch's kernels",
    )
    model: ModelSpec = ModelSpec()
    trainable: TrainableSpec = TrainableSpec()
    data: DataConfig = DataConfig()
    training: TrainingSpec = TrainingSpec()
    exchange: ExchangeSpec = ExchangeSpec()
    outer: OuterSpec = OuterSpec()
    rounds: RoundsSpec = RoundsSpec()
    audit: AuditSpec = AuditSpec()

    @model_validator(mode="after")
    def _optimizer_fits(self) -> Self:
        _require_optimizer(self.trainable, self.training)
        return self

    @classmethod
    def from_toml(cls, source: Path | str) -> RunConfig:
        """Read a TOML file, or TOML text.

        Raises:
            ConfigurationError: names every field that is wrong, what is allowed and what was found.
        """
        where = str(source) if isinstance(source, Path) else "the run's TOML"
        try:
            text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
            return cls.model_validate(tomllib.loads(text))
        except OSError as error:
            raise ConfigurationError(f"{where} cannot be read: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{where} is not TOML: {error}") from error
        except ValidationError as error:
            raise ConfigurationError(explain(error, where)) from error


class RunSpec(_Section):
    """The sealed definition of a run."""

    protocol: int = Field(PROTOCOL_VERSION, ge=1)
    name: str = Field(min_length=1, max_length=64)
    seed: int = Field(ge=0, lt=1 << 63)
    numerics: Literal["native", "exact"]
    coordinator: Hash
    checkpoint: Hash = Field(description="root of checkpoint 0")
    beacon: Hash = Field(description="the end of the beacon chain")
    parent: ParentSpec | None = None
    trunk: Hash | None = Field(None, description="root of the frozen model's parameters, where not all is trained")
    model: ModelSpec
    trainable: TrainableSpec = TrainableSpec()
    data: DataSpec
    training: TrainingSpec
    exchange: ExchangeSpec
    outer: OuterSpec
    rounds: RoundsSpec
    audit: AuditSpec

    def encode(self) -> bytes:
        """Canonical bytes; `run_id` is their hash."""
        return encoding.encode(self.model_dump(mode="python"))

    @classmethod
    def decode(cls, data: bytes) -> RunSpec:
        """Raises `ConfigurationError` if the bytes are canonical but no valid spec, `EncodingError` if not canonical."""
        value = encoding.decode(data, max_bytes=MAX_SPEC_BYTES)
        protocol = value.get("protocol", PROTOCOL_VERSION) if isinstance(value, dict) else PROTOCOL_VERSION
        if protocol != PROTOCOL_VERSION:
            raise ConfigurationError(
                f"the run speaks protocol {protocol!r:.20} and this software protocol {PROTOCOL_VERSION};"
                " run: pip install --upgrade swarm-node"
            )
        try:
            spec = cls.model_validate(value)
        except ValidationError as error:
            raise ConfigurationError(explain(error, "the run's spec")) from error
        if spec.encode() != data:
            raise ConfigurationError("the run's spec leaves fields out; ask the run owner to upgrade swarm-node")
        return spec

    @cached_property
    def run_id(self) -> bytes:
        return run_id_of(self.encode())

    @model_validator(mode="after")
    def _trunk_fits(self) -> Self:
        if (self.trunk is None) != (self.trainable.kind == "all"):
            raise ValueError("a trunk is what a run has that does not train all of its model")
        _require_optimizer(self.trainable, self.training)
        return self

    @property
    def num_trainable(self) -> int:
        """Elements of the vector that is trained, exchanged and kept in checkpoints."""
        return self.model.num_trainable(self.trainable)

    @property
    def tokens_per_step(self) -> int:
        return self.training.batch_sequences * self.model.max_position_embeddings

    def segments(self, steps: int) -> list[tuple[int, int]]:
        """The segments of a round of `steps` inner steps as (start, stop); the last may be shorter."""
        length = self.training.segment_steps
        return [(start, min(start + length, steps)) for start in range(0, steps, length)]

    @property
    def standard_tokens(self) -> int:
        """Tokens of a contribution of full size: the unit in which audits count."""
        return self.training.steps * self.tokens_per_step


def run_id_of(data: bytes) -> bytes:
    """The id of the run whose encoded spec this is, 32 bytes."""
    return blake3(data, derive_key_context="swarm-node 2026 run spec").digest()


def explain(error: ValidationError, where: str) -> str:
    """One line per wrong field: its name, what is allowed, what was found."""
    lines = []
    for item in error.errors(include_url=False):
        field = ".".join(str(step) for step in item["loc"]) or "(whole)"
        found: Any = item.get("input")
        shown = "" if isinstance(found, dict) else f" (found {found!r:.60})"
        lines.append(f"  {field}: {item['msg']}{shown}")
    return f"{where} is not valid:\n" + "\n".join(lines)
