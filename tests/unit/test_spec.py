"""A run is what its spec says, its id is the hash of that, and a mistake in the TOML is explained by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import PROTOCOL_VERSION, encoding
from swarm_protocol.errors import ConfigurationError, EncodingError
from swarm_protocol.spec import (
    MAX_PARAMETERS,
    MAX_SPEC_BYTES,
    AuditSpec,
    DataSpec,
    ExchangeSpec,
    ModelSpec,
    OptimizerSpec,
    OuterSpec,
    RoundsSpec,
    RunConfig,
    RunSpec,
    TrainingSpec,
)


def run_spec(**fields: Any) -> RunSpec:
    """A spec in which every field is written out, so that another default elsewhere does not change it."""
    sealed = {
        "protocol": 1,
        "name": "golden",
        "seed": 42,
        "numerics": "native",
        "coordinator": "11" * 32,
        "checkpoint": "22" * 32,
        "beacon": "33" * 32,
        "model": ModelSpec(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            initializer_range=0.02,
        ),
        "data": DataSpec(root="44" * 32, tokenizer="bytes", train_tokens=10_000_000, held_out_windows=64),
        "training": TrainingSpec(
            batch_sequences=8,
            micro_sequences=8,
            steps=20,
            fixed_steps=True,
            segment_steps=5,
            precision="float32",
            limbs=2,
            grain_sequences=None,
            optimizer=OptimizerSpec(
                name="muon",
                lr=0.03,
                momentum=0.95,
                newton_schulz_steps=5,
                adamw_lr=3e-3,
                beta1=0.9,
                beta2=0.95,
                eps=1e-6,
                weight_decay=0.0,
                warmup_steps=5,
                clip_norm=1.0,
            ),
        ),
        "exchange": ExchangeSpec(
            parts=8, codec="int4", aggregator="mean", max_norm=1e4, weight_cap_tokens=1 << 20, weight_after=0
        ),
        "outer": OuterSpec(lr=1.0, momentum=0.3),
        "rounds": RoundsSpec(
            count=6,
            min_nodes=1,
            max_nodes=256,
            presence_s=30.0,
            assemble_s=15.0,
            train_s=120.0,
            exchange_s=60.0,
            open_s=10.0,
            keep_rounds=4,
            snapshot_every=10,
        ),
        "audit": AuditSpec(
            probation=10,
            floor=0.2,
            budget=1.0,
            horizon=20,
            unavailable_window=20,
            accept=1e-4,
            reject=3e-4,
            evidence_s=60.0,
            rejecting_auditors=2,
            max_unavailable=3,
            tolerance_file=None,
        ),
    }
    return RunSpec(**sealed | fields)


SPEC = run_spec()


def leaves(value: object, *path: str) -> Iterator[tuple[str, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, *path, key)
    else:
        yield path


LEAVES = list(leaves(SPEC.model_dump()))
EACH_FIELD = pytest.mark.parametrize("path", LEAVES, ids=".".join)


def with_leaf(path: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> Any:
    """The spec as plain values with one field changed."""
    fields: Any = SPEC.model_dump()
    holder = fields
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return fields


def changed(value: object) -> object:
    """Something else of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case None:
            return "55" * 32
        case _:
            return f"{value}x"


def test_the_bytes_of_a_spec_and_its_run_id_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden("spec", {"a spec": {"bytes": SPEC.encode().hex(), "run id": SPEC.run_id.hex()}})


def test_a_spec_comes_back_as_it_was_sealed() -> None:
    decoded = RunSpec.decode(SPEC.encode())
    assert decoded == SPEC
    assert decoded.run_id == SPEC.run_id
    assert decoded.encode() == SPEC.encode()


@given(
    seed=st.integers(0, 2**63 - 1),
    name=st.text(min_size=1, max_size=64),
    lr=st.floats(1e-9, 10.0),
    count=st.integers(1, 1_000_000),
    tied=st.booleans(),
)
def test_any_spec_comes_back_as_it_was_sealed(seed: int, name: str, lr: float, count: int, tied: bool) -> None:
    spec = run_spec(
        seed=seed,
        name=name,
        outer=OuterSpec(lr=lr),
        rounds=RoundsSpec(count=count),
        model=ModelSpec(tie_word_embeddings=tied),
    )
    assert RunSpec.decode(spec.encode()) == spec


def unchecked(section: Any, path: tuple[str, ...]) -> Any:
    """The section with one field changed. Not validated: a field that has only one value today is in the hash as well."""
    fields = {name: getattr(section, name) for name in type(section).model_fields}
    fields[path[0]] = unchecked(fields[path[0]], path[1:]) if path[1:] else changed(fields[path[0]])
    return type(section).model_construct(**fields)


@EACH_FIELD
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_field_changes_the_run_id(path: tuple[str, ...]) -> None:
    assert unchecked(SPEC, path).run_id != SPEC.run_id


@EACH_FIELD
def test_bytes_that_leave_a_field_out_are_no_spec(path: tuple[str, ...]) -> None:
    fields = with_leaf(path, lambda holder, key: holder.pop(key))
    with pytest.raises(ConfigurationError, match=f"leaves fields out|{re.escape('.'.join(path))}"):
        RunSpec.decode(encoding.encode(fields))


def test_bytes_with_a_field_that_nobody_knows_are_no_spec() -> None:
    with pytest.raises(ConfigurationError, match=r"training\.surprise"):
        RunSpec.decode(
            encoding.encode(with_leaf(("training", "steps"), lambda holder, _: holder.update({"surprise": 1})))
        )


@pytest.mark.parametrize("value", [None, [], "spec", 1, {}])
def test_other_values_are_no_spec(value: object) -> None:
    with pytest.raises(ConfigurationError, match="spec"):
        RunSpec.decode(encoding.encode(value))


def test_an_integer_in_place_of_a_float_is_another_spelling_and_refused() -> None:
    def as_integer(holder: dict[str, Any], key: str) -> None:
        holder[key] = 1

    with pytest.raises(ConfigurationError):
        RunSpec.decode(encoding.encode(with_leaf(("outer", "lr"), as_integer)))


def test_bytes_that_are_not_canonical_or_too_many_are_refused() -> None:
    for raw in (SPEC.encode() + b"\0", SPEC.encode()[:-1], b"\xbf\xff", b"", bytes(MAX_SPEC_BYTES + 1)):
        with pytest.raises(EncodingError):
            RunSpec.decode(raw)


@pytest.mark.parametrize(
    ("toml", "field", "allowed"),
    [
        ("seed = -1", "seed", "greater than or equal to 0"),
        ('seed = "1"', "seed", "valid integer"),
        ('name = ""', "name", "at least 1 character"),
        ('name = "a/b"', "name", "should match pattern"),
        ('numerics = "fast"', "numerics", "'native'"),
        ("[model]\nhidden_size = 4", "model.hidden_size", "greater than or equal to 8"),
        ("[model]\nhidden_size = 20000", "model.hidden_size", "less than or equal to 16384"),
        ("[model]\nvocab_size = 1.5", "model.vocab_size", "valid integer"),
        ("[model]\nhidden_size = 130", "model", "multiple of num_attention_heads"),
        ("[model]\nnum_key_value_heads = 3", "model", "multiple of num_key_value_heads"),
        ("[model]\nhidden_size = 12", "model", "must be even"),
        ("[model]\nvocab_size = 1000000\nhidden_size = 16384", "model", f"at most {MAX_PARAMETERS:,}"),
        ("[model]\ntie_word_embeddings = 1", "model.tie_word_embeddings", "valid boolean"),
        ("[data]\nheld_out_fraction = 0.6", "data.held_out_fraction", "less than or equal to 0.5"),
        ("[training]\nmicro_sequences = 3", "training", "multiple of micro_sequences"),
        ("[training]\nsteps = 0", "training.steps", "greater than or equal to 1"),
        ("[training.optimizer]\nname = 'sgd'", "training.optimizer.name", "'muon' or 'adamw'"),
        ("[training.optimizer]\neps = 1e-9", "training.optimizer.eps", "greater than or equal to 0.00000001"),
        ("[training.optimizer]\nbeta2 = 1.0", "training.optimizer.beta2", "less than 1"),
        ("[training.optimizer]\nlr = nan", "training.optimizer.lr", "finite number"),
        ("[training.optimizer]\nlr = inf", "training.optimizer.lr", "finite number"),
        ("[exchange]\nparts = 65537", "exchange.parts", "less than or equal to 65536"),
        ("[exchange]\ncodec = 'zip'", "exchange.codec", "'none', 'int8' or 'int4'"),
        ("[outer]\nmomentum = 1.0", "outer.momentum", "less than 1"),
        ("[rounds]\nmin_nodes = 3\nmax_nodes = 2", "rounds", "min_nodes must not exceed max_nodes"),
        ("[rounds]\ntrain_s = 0", "rounds.train_s", "greater than or equal to 1"),
        ("[audit]\nfloor = 1.1", "audit.floor", "less than or equal to 1"),
        ("[audit]\naccept = 0.1\nreject = 0.01", "audit", "accept must not exceed reject"),
        ("[audit]\ntolerance_file = 'abc'", "audit.tolerance_file", "should match pattern"),
        ("[modle]\nhidden_size = 8", "modle", "Extra inputs are not permitted"),
        ("[model]\nhiden_size = 8", "model.hiden_size", "Extra inputs are not permitted"),
    ],
)
def test_a_mistake_in_the_toml_is_explained_by_field_and_range(toml: str, field: str, allowed: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        RunConfig.from_toml(toml)
    lines = str(caught.value).splitlines()
    assert lines[0] == "the run's TOML is not valid:"
    assert len(lines) == 2
    assert lines[1].startswith(f"  {field}: ")
    assert allowed in lines[1]


def test_all_mistakes_are_named_at_once_with_what_was_found() -> None:
    with pytest.raises(ConfigurationError) as caught:
        RunConfig.from_toml("seed = -5\n[outer]\nlr = 11.0\n[audit]\nfloor = 'often'\n")
    text = str(caught.value)
    assert "seed: " in text
    assert "(found -5)" in text
    assert "outer.lr: " in text
    assert "(found 11.0)" in text
    assert "audit.floor: " in text
    assert "(found 'often')" in text


def test_a_toml_file_is_read_and_named_in_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('name = "mine"\n[rounds]\ncount = 3\n[outer]\nlr = 1\n')
    config = RunConfig.from_toml(path)
    assert (config.name, config.rounds.count, config.outer.lr) == ("mine", 3, 1.0)
    assert config.model == RunConfig().model
    path.write_text("seed = -1")
    with pytest.raises(ConfigurationError, match=f"{path} is not valid"):
        RunConfig.from_toml(path)
    path.write_text("seed = = 1")
    with pytest.raises(ConfigurationError, match=f"{path} is not TOML"):
        RunConfig.from_toml(path)
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigurationError, match=f"{path} is not TOML"):
        RunConfig.from_toml(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        RunConfig.from_toml(tmp_path / "none.toml")


def test_the_defaults_are_a_valid_run() -> None:
    assert RunConfig.from_toml("") == RunConfig()


def test_nothing_in_a_spec_can_be_changed() -> None:
    spec: Any = SPEC
    for path in LEAVES:
        holder = spec
        for key in path[:-1]:
            holder = getattr(holder, key)
        with pytest.raises(ValueError, match="frozen"):
            setattr(holder, path[-1], getattr(holder, path[-1]))


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (ModelSpec(), 256 * 128 + 2 * (2 * 128**2 + 2 * 128 * 64 + 3 * 128 * 352 + 2 * 128) + 128),
        (ModelSpec(tie_word_embeddings=False, num_hidden_layers=1), 2 * 256 * 128 + 184576 + 128),
    ],
)
def test_the_number_of_parameters_follows_from_the_shapes(model: ModelSpec, parameters: int) -> None:
    assert model.num_parameters == parameters


def test_a_step_has_as_many_tokens_as_its_sequences() -> None:
    assert SPEC.tokens_per_step == 8 * 128


def test_a_spec_of_another_protocol_names_the_upgrade_command() -> None:
    data = encoding.encode({"protocol": PROTOCOL_VERSION + 1, "something": "new"})
    with pytest.raises(ConfigurationError, match="pip install --upgrade swarm-node"):
        RunSpec.decode(data)
