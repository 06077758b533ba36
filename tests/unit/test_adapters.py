"""A part of a model is trained as LoRA defines it, in bits that are the same everywhere, and audited like a whole one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import pytest
import torch
from blake3 import blake3
from pydantic import ValidationError
from torch.nn import functional as F  # noqa: N812

from swarm_protocol import adapters, audit, chunks, deviations, parts, training
from swarm_protocol.audit import Claims, Subject
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.exact import Trainer, backend, bisect, reference_step, segment
from swarm_protocol.model import llama
from swarm_protocol.records import Commitment, Outcome, RoundPlan, Seat
from swarm_protocol.spec import ModelSpec, OptimizerSpec, RunConfig, RunSpec, TrainableSpec
from swarm_protocol.training import Float32, Tokens, TrainState

Numerics = Literal["native", "exact"]

NORMS = TrainableSpec(kind="norms")
LORA = TrainableSpec(kind="lora", r=3, alpha=5, targets=("down_proj", "v_proj", "q_proj"))
EVERY_TARGET = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = segment.self_test_spec().model.model_copy(update={"num_hidden_layers": 2})
TRUNK = llama.initial_parameters(MODEL, 7)
TRUNK.flags.writeable = False
STEPS = 4
HERE = bytes(32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_spec(trainable: TrainableSpec = LORA, numerics: Numerics = "exact") -> RunSpec:
    spec = segment.self_test_spec()
    optimizer = OptimizerSpec(name="adamw", lr=3e-3, weight_decay=0.1, warmup_steps=0)
    recipe = spec.training.model_copy(
        update={
            "batch_sequences": 4,
            "micro_sequences": 2,
            "grain_sequences": 1,
            "steps": STEPS,
            "segment_steps": 2,
            "optimizer": optimizer,
        }
    )
    return spec.model_copy(
        update={
            "numerics": numerics,
            "model": MODEL,
            "trainable": trainable,
            "trunk": chunks.manifest_of(TRUNK).root.hex(),
            "training": recipe,
        }
    )


def batch(step: int) -> Tokens:
    return np.random.default_rng(step).integers(0, MODEL.vocab_size, (4, MODEL.max_position_embeddings + 1))


def moved(spec: RunSpec, seed: int = 0) -> Float32:
    """Trained parameters as after some training, B no longer zero."""
    noise = np.random.default_rng(seed).standard_normal(spec.num_trainable).astype(np.float32)
    return adapters.initial(MODEL, spec.trainable, 1, TRUNK) + np.float32(0.02) * noise


# What is trained


@pytest.mark.parametrize("targets", [("v_proj", "q_proj"), ("down_proj", "up_proj"), EVERY_TARGET])
@pytest.mark.parametrize("tied", [True, False])
def test_the_spec_counts_what_the_shapes_hold(targets: tuple[str, ...], tied: bool) -> None:
    model = MODEL.model_copy(update={"tie_word_embeddings": tied})
    for trainable in (
        TrainableSpec(),
        NORMS,
        TrainableSpec.model_validate({"kind": "lora", "r": 5, "targets": targets}),
    ):
        shapes = adapters.trainable_shapes(model, trainable)
        assert sum(math.prod(shape) for shape in shapes.values()) == model.num_trainable(trainable)


def test_adapters_lie_layer_by_layer_in_the_order_of_the_model_whatever_the_spec_lists_first() -> None:
    names = list(adapters.trainable_shapes(MODEL, LORA).items())
    assert names[:6] == [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", (3, 32)),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", (32, 3)),
        ("model.layers.0.self_attn.v_proj.lora_A.weight", (3, 32)),
        ("model.layers.0.self_attn.v_proj.lora_B.weight", (16, 3)),
        ("model.layers.0.mlp.down_proj.lora_A.weight", (3, 48)),
        ("model.layers.0.mlp.down_proj.lora_B.weight", (32, 3)),
    ]
    assert len(names) == 12


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapters_have_the_names_and_shapes_that_peft_gives_them() -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    sizes = MODEL.model_dump(include=set(ModelSpec.model_fields) - {"rope_theta"})
    theirs = peft.get_peft_model(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        peft.LoraConfig(r=3, lora_alpha=5, target_modules=list(EVERY_TARGET), bias="none"),
    )
    found = {
        name.removeprefix("base_model.model."): tuple(tensor.shape)
        for name, tensor in peft.get_peft_model_state_dict(theirs).items()
    }
    trainable = TrainableSpec.model_validate({"kind": "lora", "r": 3, "targets": EVERY_TARGET})
    assert found == adapters.trainable_shapes(MODEL, trainable)


@pytest.mark.parametrize("numerics", ["native", "exact"])
@pytest.mark.parametrize("trainable", [NORMS, LORA])
def test_before_training_the_model_is_the_trunk(trainable: TrainableSpec, numerics: Numerics) -> None:
    spec = run_spec(trainable, numerics)
    start = adapters.initial(MODEL, trainable, 1, TRUNK)
    assert np.array_equal(adapters.full_parameters(spec, start, TRUNK), TRUNK)


def test_initial_adapters_are_the_same_bits_everywhere(golden: Callable[[str, dict[str, object]], None]) -> None:
    large = TrainableSpec.model_validate({"kind": "lora", "r": 128, "targets": ["down_proj"]})
    wide = ModelSpec(hidden_size=64, intermediate_size=16384, num_attention_heads=2, num_hidden_layers=1)
    found = {}
    for name, model, trainable in (("small", MODEL, LORA), ("large", wide, large), ("norms", MODEL, NORMS)):
        flat = adapters.initial(model, trainable, 1, llama.initial_parameters(model, 1))
        found[name] = {
            "blake3": blake3(flat.astype("<f4").tobytes()).hexdigest(),
            "first": [float(x).hex() for x in flat[:4]],
        }
    golden("adapters", {"initial": found})


def test_initial_adapters_spread_as_pefts_do() -> None:
    trainable = TrainableSpec.model_validate({"kind": "lora", "r": 64, "targets": ["q_proj"]})
    a = adapters.initial(MODEL, trainable, 1, TRUNK)[: 64 * 32]
    bound = 1 / math.sqrt(32)  # torch.nn.init.kaiming_uniform_(a=sqrt(5))
    assert float(np.abs(a).max()) == pytest.approx(bound, rel=0.01)
    assert float(a.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_a_trunk_of_another_model_is_refused() -> None:
    spec = run_spec()
    state = TrainState.initial(spec, moved(spec))
    for trunk in (None, TRUNK[:-1], TRUNK.astype(np.float64)):
        for attempt in (
            lambda trunk=trunk: adapters.full_parameters(spec, state.parameters, trunk),
            lambda trunk=trunk: training.run_segment(spec, state, batch, 1, trunk),
            lambda trunk=trunk: training.evaluate(spec, state.parameters, [batch(0)], trunk),
        ):
            with pytest.raises(InvalidDataError, match="trunk"):
                attempt()
    whole = run_spec(TrainableSpec(), "native").model_copy(update={"trunk": None})
    with pytest.raises(InvalidDataError, match="no trunk"):
        training.run_segment(whole, TrainState.initial(whole, TRUNK.copy()), batch, 1, TRUNK)


@pytest.mark.parametrize("trainable", ['"norms"', '{ kind = "lora", r = 4 }'])
def test_a_part_is_trained_by_adamw_alone(trainable: str) -> None:
    text = f"trainable = {trainable}\n[training.optimizer]\nname = "
    assert RunConfig.from_toml(text + '"adamw"').trainable.kind in ("norms", "lora")
    with pytest.raises(ConfigurationError, match=r'needs training.optimizer.name = "adamw"'):
        RunConfig.from_toml(text + '"muon"')
    muon = run_spec().training.model_copy(update={"optimizer": OptimizerSpec()})
    with pytest.raises(ValidationError, match="adamw"):
        RunSpec.model_validate(run_spec().model_dump() | {"training": muon.model_dump()})


# Gradients


@pytest.mark.parametrize(("numerics", "error"), [("native", 1e-5), ("exact", 4e-3)])
def test_the_gradient_is_that_of_adapters_beside_frozen_matrices(numerics: Numerics, error: float) -> None:
    """An independent LoRA, by autograd: y = x Wᵀ + (x Aᵀ) Bᵀ · alpha / r. AdamW's first moment shows our gradient."""
    spec = run_spec(LORA, numerics)
    start = TrainState.initial(spec, moved(spec))
    end = training.run_segment(spec, start, batch, 1, TRUNK)
    shapes = adapters.trainable_shapes(MODEL, LORA)
    moments = end.moments[: spec.num_trainable]

    model = llama.build(MODEL)
    llama.load_flat(model, TRUNK)
    flat = torch.from_numpy(start.parameters.copy()).requires_grad_()
    trained = llama.named_views(shapes, flat)
    for name in adapters.adapted_matrices(MODEL, LORA):
        layer = model.get_submodule(name)
        layer.weight.requires_grad_(False)
        a, b = (trained[f"{name}.lora_{one}.weight"] for one in "AB")

        def forward(
            x: torch.Tensor, w: torch.Tensor = layer.weight, a: torch.Tensor = a, b: torch.Tensor = b
        ) -> torch.Tensor:
            return F.linear(x, w) + F.linear(F.linear(x, a), b) * (5 / 3)

        layer.forward = forward
    llama.loss(model, torch.from_numpy(batch(0))).backward()  # type: ignore[no-untyped-call]
    assert flat.grad is not None
    clipped = flat.grad * min(1.0, spec.training.optimizer.clip_norm / float(flat.grad.norm()))
    ours = torch.from_numpy(moments) / (1 - spec.training.optimizer.beta1)
    for name, expected in llama.named_views(shapes, clipped).items():
        found = llama.named_views(shapes, ours)[name]
        assert float((found - expected).norm() / expected.norm()) < error, name


def test_gains_are_trained_as_they_are_in_a_whole_model() -> None:
    spec = run_spec(NORMS, "native")
    end = training.run_segment(spec, TrainState.initial(spec, moved(spec)), batch, 1, TRUNK)
    full = adapters.full_parameters(spec, moved(spec), TRUNK)
    model = llama.build(MODEL)
    llama.load_flat(model, full)
    llama.loss(model, torch.from_numpy(batch(0))).backward()  # type: ignore[no-untyped-call]
    gradient = torch.cat([model.get_parameter(name).grad for name in adapters.trainable_shapes(MODEL, NORMS)])  # type: ignore[misc]
    clipped = gradient * min(1.0, 1.0 / float(gradient.norm()))
    torch.testing.assert_close(torch.from_numpy(end.moments[: spec.num_trainable]) * 10, clipped, rtol=1e-4, atol=1e-7)


# Exact numerics


@pytest.mark.parametrize(
    "trainable",
    [NORMS, LORA, TrainableSpec.model_validate({"kind": "lora", "r": 1, "alpha": 3, "targets": EVERY_TARGET})],
    ids=["norms", "lora", "rank 1"],
)
@pytest.mark.parametrize("limbs", [2, 3])
def test_every_backend_gives_the_references_bits(trainable: TrainableSpec, limbs: int) -> None:
    spec = run_spec(trainable)
    state = TrainState.initial(spec, moved(spec))
    parameters, moments = state.parameters, state.moments
    for step in range(2):
        parameters, moments, _ = reference_step.step(
            spec, parameters, moments, step, batch(step), trunk=TRUNK, limbs=limbs, grain_sequences=2
        )
    expected = TrainState(2, parameters, moments).manifest().root
    for one in backend.candidates("cpu"):
        trainer = Trainer(spec, limbs=limbs, grain_sequences=2, backend=one)
        assert trainer.run(state, batch, 2, TRUNK).manifest().root == expected, one.name


def test_what_is_merged_once_has_the_bits_of_what_is_trained() -> None:
    spec = run_spec()
    shapes = adapters.trainable_shapes(MODEL, LORA)
    trained, trunk = (
        reference_step.split(one, flat) for one, flat in ((shapes, moved(spec)), (llama.parameter_shapes(MODEL), TRUNK))
    )
    merged = reference_step.merge(LORA, trunk, trained, limbs=2)
    expected = np.concatenate([merged[name].reshape(-1) for name in trunk])
    assert adapters.full_parameters(spec, moved(spec), TRUNK).tobytes() == expected.tobytes()


@pytest.mark.parametrize("trainable", [NORMS, LORA])
def test_threads_micro_batches_and_cuts_change_no_bit(
    trainable: TrainableSpec, golden: Callable[[str, dict[str, object]], None]
) -> None:
    spec = run_spec(trainable)
    start = TrainState.initial(spec, moved(spec))
    found = [training.run_segment(spec, start, batch, STEPS, TRUNK)]
    golden("adapters", {f"four steps of {trainable.kind}": found[0].manifest().root.hex()})
    state = start
    for stop in (1, 3, STEPS):
        state = training.run_segment(spec, state, batch, stop, TRUNK.copy())
    found.append(state)
    found += [Trainer(spec, grain_sequences=1, micro_sequences=n).run(start, batch, STEPS, TRUNK) for n in (1, 4)]
    if trainable is LORA:  # gains are copied
        torch.set_num_threads(2)
        found.append(training.run_segment(spec, start, batch, STEPS, TRUNK))
    assert len({one.manifest().root for one in found}) == 1


def test_a_trainer_that_has_evaluated_or_met_another_trunk_trains_as_a_new_one() -> None:
    spec = run_spec(numerics="native")
    start = TrainState.initial(spec, moved(spec))
    expected = training.run_segment(spec, start, batch, 2, TRUNK).manifest().root
    trainer = training.Trainer(spec)
    trainer.run(start, batch, 2, llama.initial_parameters(MODEL, 8))
    assert trainer.run(start, batch, 2, TRUNK).manifest().root == expected
    trainer.evaluate(moved(spec, seed=1), [batch(0)], llama.initial_parameters(MODEL, 9))
    assert trainer.run(start, batch, 2, TRUNK).manifest().root == expected


@pytest.mark.parametrize("numerics", ["native", "exact"])
def test_training_adapters_lowers_the_loss_of_the_merged_model(numerics: Numerics) -> None:
    spec = run_spec(LORA, numerics)
    start = TrainState.initial(spec, adapters.initial(MODEL, LORA, 1, TRUNK))
    one_batch = [batch(0)]
    before = training.evaluate(spec, start.parameters, one_batch, TRUNK)
    end = training.run_segment(spec, start, lambda _: batch(0), STEPS, TRUNK)
    after = training.evaluate(spec, end.parameters, one_batch, TRUNK)
    assert after < before - 1e-3
    full = adapters.full_parameters(spec, end.parameters, TRUNK)
    model = llama.build(MODEL)
    llama.load_flat(model, full)
    assert llama.loss(model, torch.from_numpy(batch(0))).item() == pytest.approx(after, rel=1e-6)


# Audits, exchange and checkpoints


def contribution(
    spec: RunSpec, deviation: deviations.Deviation = deviations.honest
) -> tuple[Subject, list[TrainState]]:
    def run(spec: RunSpec, state: TrainState, batch: deviations.Batch, stop: int) -> TrainState:
        return training.run_segment(spec, state, batch, stop, TRUNK)

    start = TrainState.initial(spec, moved(spec))
    states = list(deviation(spec, start, batch, STEPS, run))
    seat = Seat(peer=bytes(32), steps=STEPS, weight=1, reducer=True)
    plan = RoundPlan(
        run=spec.run_id, round=0, base=bytes(32), roster=(seat,), cursor=0, commit_by_ms=0, exchange_by_ms=0,
        previous_beacon=bytes(32), log_size=0, log_root=bytes(32),
    )  # fmt: skip
    encoded = parts.encode_parts(spec, start.parameters, states[-1].parameters)
    commitment = Commitment(
        run=spec.run_id, round=0, plan=plan.hash, slot=0, tokens=STEPS * spec.tokens_per_step,
        trace_root=training.trace_root([state.manifest().root for state in states]),
        parts_root=parts.parts_root(parts.part_hashes(encoded)), nonce_hash=bytes(32), fingerprint=HERE,
        train_loss=1.0,
    )  # fmt: skip
    return Subject(spec, plan, 0, commitment, start.parameters, trunk=TRUNK), states


def outcome(subject: Subject, states: list[TrainState], drawn: list[int]) -> Outcome:
    served = {index: TrainState.from_bytes(subject.spec, b"".join(map(bytes, one.buffers()))) for index, one in
              enumerate(states)}  # fmt: skip
    roots = tuple(state.manifest().root for state in states)
    return audit.examine(subject, drawn, Claims(roots, served), batch, fingerprint=HERE).judgement.outcome


@pytest.mark.parametrize("numerics", ["native", "exact"])
@pytest.mark.parametrize("trainable", [NORMS, LORA])
def test_an_audit_accepts_honest_adapters_and_rejects_a_cheat(trainable: TrainableSpec, numerics: Numerics) -> None:
    spec = run_spec(trainable, numerics)
    for drawn in ([0], [1], [0, 1]):
        assert outcome(*contribution(spec), drawn) is Outcome.ACCEPTED
    for kind in ("half-batch", "learning-rate", "scaled"):
        assert outcome(*contribution(spec, deviations.KINDS[kind]), [0, 1]) is Outcome.REJECTED


def test_a_traced_step_shows_the_merged_matrices_first_and_the_pulled_back_gradients() -> None:
    spec = run_spec()
    state = TrainState.initial(spec, moved(spec))
    end, seen = bisect.observe_step(spec, state, batch(0), TRUNK, grain_sequences=1)
    assert end.manifest().root == Trainer(spec, grain_sequences=1).run(state, batch, 1, TRUNK).manifest().root
    operators = [one.operator for one in seen]
    assert operators[:2] == ["model.layers.0.self_attn.q_proj: merged", "model.layers.0.self_attn.v_proj: merged"]
    assert sum(": gradient of lora_" in operator for operator in operators) == 12
    _, other = bisect.observe_step(spec, state, batch(0), TRUNK * np.float32(2), grain_sequences=1)
    first = bisect.first_differing_operator(seen, other)
    assert first is not None
    assert first.operator == operators[0]


def test_training_on_another_trunk_is_found() -> None:
    subject, states = contribution(run_spec())
    other = Subject(subject.spec, subject.plan, 0, subject.commitment, subject.parameters, trunk=TRUNK * np.float32(2))
    assert outcome(other, states, [0, 1]) is Outcome.REJECTED


def test_states_parts_and_checkpoints_are_of_what_is_trained_alone() -> None:
    spec = run_spec()
    subject, states = contribution(spec)
    n = spec.num_trainable
    assert n < spec.model.num_parameters / 10
    assert states[-1].manifest().size_bytes == training.size_bytes(spec) == 4 * 3 * n + 8
    assert parts.slices(spec)[-1].stop == n
    checkpoint = Checkpoint.initial(subject.parameters)
    data = b"".join(map(bytes, checkpoint.buffers))
    assert len(data) == 8 * n
    assert Checkpoint.from_bytes(spec, 0, data, checkpoint.root).root == checkpoint.root
