"""Exact training gives the same bits whatever computes it, and refuses where it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from swarm_protocol.errors import ConfigurationError, InvalidDataError, UnsupportedPlatformError
from swarm_protocol.exact import Trainer, backend, bisect, reference_step, run_segment, segment, trusted_backend
from swarm_protocol.exact.backend import Backend
from swarm_protocol.model import llama
from swarm_protocol.spec import OptimizerSpec, RunSpec
from swarm_protocol.training import NonFiniteError, Tokens, TrainingCancelledError, TrainState
from swarm_protocol.training import run_segment as native_segment

STEPS = 20
ADAMW = OptimizerSpec(name="adamw", lr=3e-3)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other work, two threads that wait for each other are many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(optimizer: OptimizerSpec | None = None, *, tied: bool = True) -> RunSpec:
    spec = segment.self_test_spec()
    return spec.model_copy(
        update={
            "model": spec.model.model_copy(update={"tie_word_embeddings": tied, "num_hidden_layers": 2}),
            "training": spec.training.model_copy(
                update={"batch_sequences": 5, "micro_sequences": 1, "optimizer": optimizer or OptimizerSpec()}
            ),
        }
    )


def start(spec: RunSpec) -> TrainState:
    return TrainState.initial(spec, llama.initial_parameters(spec.model, 1))


def batch(step: int) -> Tokens:
    return np.random.default_rng(step).integers(0, 40, (5, 25))


def state_hash(spec: RunSpec, *, limbs: int = 2, micro: int = 1, steps: int = STEPS) -> str:
    trainer = Trainer(spec, limbs=limbs, grain_sequences=1, micro_sequences=micro)
    return segment.hash_of_states(trainer.run(start(spec), batch, steps))


def backends() -> list[Backend]:
    return list(backend.candidates("cpu"))


@pytest.mark.parametrize(("optimizer", "tied", "limbs"), [(None, True, 2), (ADAMW, False, 3)])
def test_every_backend_gives_the_bits_of_the_reference(optimizer: OptimizerSpec | None, tied: bool, limbs: int) -> None:
    spec = tiny(optimizer, tied=tied)
    state = start(spec)
    parameters, moments, losses = state.parameters, state.moments, []
    for step in range(3):
        parameters, moments, loss = reference_step.step(
            spec, parameters, moments, step, batch(step), limbs=limbs, grain_sequences=2
        )
        losses.append(loss)
    for one in backends():
        found: list[float] = []
        trainer = Trainer(spec, limbs=limbs, grain_sequences=2, backend=one)
        end = trainer.run(state, batch, 3, on_step=lambda _, loss, found=found: found.append(loss))  # type: ignore[misc]
        assert end.parameters.tobytes() == parameters.tobytes(), one.name
        assert end.moments.tobytes() == moments.tobytes(), one.name
        assert found == losses, one.name


def test_the_self_test_is_held_against_the_reference() -> None:
    spec = segment.self_test_spec()
    states = [segment.self_test_state(spec)]
    for step in range(2):
        parameters, moments, _ = reference_step.step(
            spec, states[-1].parameters, states[-1].moments, step, segment.self_test_batch(step), grain_sequences=1
        )
        states.append(TrainState(step + 1, parameters, moments))
    assert segment.hash_of_states(*states[1:]) == segment.SELF_TEST_HASH
    squares = np.abs(states[1].moments[states[1].moments != 0])
    assert (squares < 2.0**-126).any(), "no subnormal numbers are tested"


def test_twenty_steps_end_where_they_always_did(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden(
        "exact",
        {
            "20 steps of muon, 2 limbs": state_hash(tiny()),
            "20 steps of adamw, 3 limbs, untied": state_hash(tiny(ADAMW, tied=False), limbs=3),
        },
    )


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba", reason="numba is optional")
    monkeypatch.setattr("swarm_protocol.exact.compiled.team.WORTH_SHARING", 1)
    spec = tiny()
    expected = state_hash(spec, micro=4, steps=2)
    torch.set_num_threads(threads)
    assert state_hash(spec, micro=4, steps=2) == expected


@pytest.mark.parametrize("micro", [2, 4, 5])
def test_a_micro_batch_of_any_number_of_grains_changes_no_bit(micro: int) -> None:
    spec = tiny()
    assert state_hash(spec, micro=micro, steps=4) == state_hash(spec, steps=4)


def test_the_grain_is_part_of_the_definition() -> None:
    spec = tiny()
    ends = [run_segment(spec, start(spec), batch, 1, grain_sequences=grain).parameters.tobytes() for grain in (1, 2)]
    assert ends[0] != ends[1]


def test_segments_cut_a_round_anywhere() -> None:
    spec = tiny()
    whole = run_segment(spec, start(spec), batch, 4)
    half = run_segment(spec, start(spec), batch, 2)
    assert segment.hash_of_states(run_segment(spec, half, batch, 4)) == segment.hash_of_states(whole)


def test_a_trainer_is_used_again_for_the_next_segment_of_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[RunSpec] = []
    initialise = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda *args, **kw: (built.append(args[1]), initialise(*args, **kw))[1])
    spec, other = tiny(), tiny(ADAMW)
    run_segment(other, start(other), batch, 1)
    built.clear()
    half = run_segment(spec, start(spec), batch, 1)
    end = run_segment(spec, half, batch, 2)
    assert built == [spec]
    run_segment(other, start(other), batch, 1)
    assert run_segment(spec, half, batch, 2).parameters.tobytes() == end.parameters.tobytes()
    assert built == [spec, other, spec]


def test_threads_that_train_at_the_same_time_do_not_share_a_trainer() -> None:
    spec = tiny()
    expected = segment.hash_of_states(run_segment(spec, start(spec), batch, 2))
    meet = threading.Barrier(2, timeout=60)
    found: list[str] = []

    def together(_step: int, _loss: float) -> None:
        meet.wait()

    def run() -> None:
        torch.set_num_threads(1)
        end = run_segment(spec, start(spec), batch, 2, on_step=together)
        found.append(segment.hash_of_states(end))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected, expected]


@pytest.mark.parametrize(
    ("threads", "environment"),
    [
        (1, {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "AVX2"}),
        (2, {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_WAIT_POLICY": "PASSIVE"}),
    ],
)
def test_another_process_with_other_kernels_and_threads_ends_in_the_same_state(
    threads: int, environment: dict[str, str]
) -> None:
    program = f"""
import runpy, torch
torch.set_num_threads({threads})
tests = runpy.run_path({__file__!r})
print(tests["state_hash"](tests["tiny"](), micro=2, steps=5))
"""
    found = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == state_hash(tiny(), steps=5)


def test_training_learns_as_native_training_does() -> None:
    spec = tiny()
    losses: dict[str, list[float]] = {"exact": [], "native": []}
    for name, run in (("exact", run_segment), ("native", native_segment)):
        run(spec, start(spec), lambda _: batch(0), 20, on_step=lambda _, loss, name=name: losses[name].append(loss))  # type: ignore[operator]
    assert losses["exact"][-1] < 0.7 * losses["exact"][0]
    np.testing.assert_allclose(losses["exact"], losses["native"], rtol=0.02)


@pytest.mark.parametrize("bad", [np.inf, np.nan, 2.0**101])
def test_a_parameter_that_is_not_finite_or_too_large_is_refused(bad: float) -> None:
    spec = tiny()
    for at in (3, -1, 5000):
        state = start(spec)
        state.parameters[at] = bad
        with np.errstate(all="ignore"), pytest.raises(NonFiniteError, match="learning rate"):
            run_segment(spec, state, batch, 1)


def test_a_thread_that_flushes_subnormals_is_refused_whoever_had_its_number_before() -> None:
    caught: list[BaseException] = []
    numbers: list[int] = []

    def run(flush: bool) -> None:
        numbers.append(threading.get_ident())
        torch.set_flush_denormal(flush)
        try:
            trusted_backend("cpu")
        except UnsupportedPlatformError as error:
            caught.append(error)

    for flush in (False, True):
        thread = threading.Thread(target=run, args=(flush,))
        thread.start()
        thread.join()
    assert len(caught) == 1, numbers
    assert "known result" in str(caught[0])


def test_threads_of_torch_that_flush_subnormals_are_noticed() -> None:
    found: list[bool] = []

    def run() -> None:
        torch.set_num_threads(2)
        torch.set_flush_denormal(True)
        torch.ones(1 << 20).mul_(2)  # starts torch's second thread, which inherits the mode
        torch.set_flush_denormal(False)
        found.extend(segment.every_thread_rounds(threads) for threads in (2, 1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False, True]


def test_batches_and_models_that_do_not_fit_are_refused() -> None:
    spec = tiny()
    with pytest.raises(InvalidDataError, match="batch of"):
        run_segment(spec, start(spec), lambda _: batch(0)[:3], 1)
    with pytest.raises(InvalidDataError, match="vocabulary"):
        run_segment(spec, start(spec), lambda _: batch(0) + 1, 1)
    long = spec.model.model_copy(update={"max_position_embeddings": 1 << 16})
    with pytest.raises(ConfigurationError, match="max_position_embeddings"):
        Trainer(spec.model_copy(update={"model": long}))


def test_a_segment_can_be_cancelled_between_steps() -> None:
    seen: list[int] = []
    with pytest.raises(TrainingCancelledError):
        run_segment(
            *(tiny(), start(tiny()), batch, 3),
            on_step=lambda step, _: seen.append(step),
            cancelled=lambda: len(seen) == 2,
        )
    assert seen == [0, 1]


def test_the_compiled_passes_contain_no_fused_multiply_add() -> None:
    numba = pytest.importorskip("numba", reason="numba is optional")
    from swarm_protocol.exact.compiled import layers, updates

    state_hash(tiny(), steps=1)
    for kernel in (layers.finish, layers.swiglu_gradient, updates.adamw):
        again = numba.njit(kernel.signatures[0], error_model="numpy")(kernel.py_func)
        for text in again.inspect_asm().values():
            assert re.search("mul[ps]s|fmul", text)
            assert not re.search("fn?m(add|sub)|fmla|fmls", text)


def test_a_dispute_narrows_to_the_first_differing_step() -> None:
    ours = [bytes([step]) for step in range(21)]
    theirs = [root if step < 13 else b"other" for step, root in enumerate(ours)]
    asked: list[int] = []

    def root(step: int) -> bytes:
        asked.append(step)
        return theirs[step]

    assert bisect.first_differing_step(ours.__getitem__, root, 0, 20) == 12
    assert len(asked) < 9
    with pytest.raises(ValueError, match="bisection"):
        bisect.first_differing_step(ours.__getitem__, ours.__getitem__, 0, 20)


@pytest.mark.parametrize(
    ("parameter", "operator"),
    [
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1: down_proj"),
        ("model.layers.0.self_attn.k_proj.weight", "model.layers.0: q, k, v"),
        ("model.norm.weight", "head"),
    ],
)
def test_a_dispute_narrows_to_the_first_differing_operator(parameter: str, operator: str) -> None:
    spec, offset = tiny(), 0
    for name, shape in llama.parameter_shapes(spec.model).items():
        if name == parameter:
            break
        offset += int(np.prod(shape))
    honest, other = start(spec), start(spec)
    _, ours = bisect.observe_step(spec, honest, batch(0), grain_sequences=1)
    _, again = bisect.observe_step(spec, honest, batch(0), grain_sequences=1)
    assert bisect.first_differing_operator(ours, again) is None
    other.parameters[offset] += np.float32(0.5)
    _, theirs = bisect.observe_step(spec, other, batch(0), grain_sequences=1)
    found = bisect.first_differing_operator(ours, theirs)
    assert found is not None
    assert (found.grain, found.operator) == (0, operator)


def test_a_learning_rate_off_by_a_ten_thousandth_ends_elsewhere() -> None:
    spec = tiny()
    other = tiny(OptimizerSpec(lr=0.03 * 1.0001))
    assert state_hash(spec, steps=1) != state_hash(other, steps=1)
