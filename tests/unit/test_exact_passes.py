"""Every fast pass gives the bits of the numpy reference, whatever the shapes and values; so does every way to multiply."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarm_protocol.exact import backend, reference, reference_step, rule
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Multiply, Products, Scratch, multiply_float, multiply_int8, padded_for_cuda
from swarm_protocol.exact.rule import StepScalars
from swarm_protocol.spec import OptimizerSpec

Float32 = npt.NDArray[np.float32]

sizes = st.integers(1, 37)
row_counts = st.one_of(sizes, st.sampled_from([64, 65, 100]))  # more rows than a compiled pass takes at once
limb_counts = st.sampled_from([2, 3])
numbers = st.one_of(
    st.floats(-(2.0**60), 2.0**60, width=32),
    st.floats(-8, 8, width=32),
    st.sampled_from([0.0, -0.0, 2.0**-149, -(2.0**-130), 2.0**-126, 1.0, -1.0]),
)
examples = settings(max_examples=25, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other work, two threads that wait for each other are many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["eager", "compiled", "compiled, 3 threads", "fused"])
def passes(request: pytest.FixtureRequest) -> Iterator[Passes]:
    name, _, threads = request.param.partition(", ")
    if name == "fused":
        yield cast(Passes, request.getfixturevalue("fused_interpreted"))
        return
    if name == "compiled":
        pytest.importorskip("numba", reason="numba is optional")
    with pytest.MonkeyPatch.context() as patch:
        if threads:
            torch.set_num_threads(3)
            patch.setattr("swarm_protocol.exact.compiled.team.WORTH_SHARING", 1)
        yield cast(Passes, importlib.import_module(f"swarm_protocol.exact.{name}"))
    torch.set_num_threads(1)


@st.composite
def matrix(draw: st.DrawFn, rows: int, columns: int) -> Float32:
    return draw(hnp.arrays(np.float32, (rows, columns), elements=numbers))


def moderate(seed: int, *shape: int) -> Float32:
    """Normal numbers whose rows differ in size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * np.exp2(rng.integers(-20, 20, (shape[0], *[1] * (len(shape) - 1))))
    return x.astype(np.float32)


def same(found: torch.Tensor | npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Equal bit by bit."""
    found = found.numpy() if isinstance(found, torch.Tensor) else found
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes()


def tensor(x: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.array(x, order="C"))


def limbs_of(limbs: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(limbs, rows, width, dtype=torch.int8), torch.empty(rows, dtype=torch.int32)


def same_limbs(planes: torch.Tensor, e: torch.Tensor, expected: reference.Operand) -> None:
    same(planes.long(), np.stack(expected.limbs(len(planes))))
    same(e.long(), expected.e)


def status() -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32)


@examples
@given(data=st.data(), rows=row_counts, width=sizes, limbs=limb_counts)
def test_limbs(passes: Passes, data: st.DataObject, rows: int, width: int, limbs: int) -> None:
    x = data.draw(matrix(rows, width))
    planes, e = limbs_of(limbs, rows, width)
    passes.limbs(tensor(x), planes, e, status())
    same_limbs(planes, e, reference.operand(x, limbs))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 2.0**101])
def test_what_is_not_finite_or_too_large_is_noticed(passes: Passes, bad: float) -> None:
    x = torch.ones(3, 5)
    x[1, 2] = bad
    planes, e = limbs_of(2, 3, 5)
    seen = status()
    passes.limbs(x, planes, e, seen)
    assert int(seen) > rule.HIGHEST_EXPONENT


@pytest.mark.parametrize("multiply", [multiply_int8, multiply_float])
@examples
@given(data=st.data(), m=sizes, k=sizes, n=sizes, limbs=limb_counts)
def test_products(passes: Passes, multiply: Multiply, data: st.DataObject, m: int, k: int, n: int, limbs: int) -> None:
    a, b = reference.operand(data.draw(matrix(m, k)), limbs), reference.operand(data.draw(matrix(n, k)), limbs)
    products = Products(passes, multiply, limbs, Scratch(torch.device("cpu")))
    planes = [tensor(np.stack(x.limbs(limbs)).astype(np.int8)) for x in (a, b)]
    out = torch.empty(m, n)
    with np.errstate(over="ignore"):
        expected = reference.product(a.limbs(limbs), a.e, [limb.T for limb in b.limbs(limbs)], b.e)
        products(planes[0], tensor(a.e).int(), planes[1].mT, tensor(b.e).int(), out)
        same(out, expected)
        products(planes[0], tensor(a.e).int(), planes[1].mT, tensor(b.e).int(), out, keep=0.5)
        if np.isfinite(expected).all():
            same(out, expected * np.float32(0.5) + expected)


@pytest.mark.parametrize("multiply", [multiply_int8, multiply_float])
def test_products_of_the_largest_limbs_do_not_saturate(multiply: Multiply) -> None:
    assert backend.multiplies_exactly(multiply, "cpu")


@examples
@given(m=sizes, k=sizes, n=sizes, by_columns=st.tuples(st.booleans(), st.booleans()))
def test_operands_are_padded_to_what_int8_kernels_on_a_gpu_take(
    m: int, k: int, n: int, by_columns: tuple[bool, bool]
) -> None:
    shapes = [shape[::-1] if turned else shape for shape, turned in zip(((m, k), (k, n)), by_columns, strict=True)]
    operands = [
        torch.arange(math.prod(shape)).mul(37).remainder(129).sub(64).to(torch.int8).view(shape) for shape in shapes
    ]
    a, b = (x.mT if turned else x for x, turned in zip(operands, by_columns, strict=True))
    rows, columns = padded_for_cuda(a, b)
    assert len(rows) > 16
    assert not any(size % 8 for size in (*rows.shape, *columns.shape))
    assert rows.is_contiguous()
    assert columns.mT.is_contiguous()
    assert torch.equal((rows.long() @ columns.long())[:m, :n], a.long() @ b.long())


def test_operands_that_fit_a_gpu_are_not_copied() -> None:
    a, b = torch.ones(24, 16, dtype=torch.int8), torch.ones(32, 16, dtype=torch.int8).mT
    assert [x.data_ptr() for x in padded_for_cuda(a, b)] == [a.data_ptr(), b.data_ptr()]


@pytest.mark.parametrize("multiply", [multiply_int8, multiply_float])
def test_products_longer_than_the_cut(passes: Passes, multiply: Multiply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rule, "K_CUT", 16)
    a, b = reference.operand(moderate(0, 5, 50), 2), reference.operand(moderate(1, 7, 50), 2)
    out = torch.empty(5, 7)
    planes = [tensor(np.stack(x.limbs(2)).astype(np.int8)) for x in (a, b)]
    products = Products(passes, multiply, 2, Scratch(torch.device("cpu")))
    products(planes[0], tensor(a.e).int(), planes[1].mT, tensor(b.e).int(), out)
    same(out, reference.product(a.limbs(2), a.e, [limb.T for limb in b.limbs(2)], b.e))


@examples
@given(data=st.data(), tokens=row_counts, width=sizes, grain=st.integers(1, 80), limbs=limb_counts)
def test_a_gradient_becomes_limbs_by_rows_and_by_columns_of_its_grains(
    passes: Passes, data: st.DataObject, tokens: int, width: int, grain: int, limbs: int
) -> None:
    dy = data.draw(matrix(tokens, width))
    w_e, x_e = (data.draw(hnp.arrays(np.int32, n, elements=st.integers(-100, 30))) for n in (width, tokens))
    rows, rows_e = limbs_of(limbs, tokens, width)
    grains = -(-tokens // grain)
    columns, columns_e = limbs_of(limbs, tokens, width)[0], torch.empty(grains, width, dtype=torch.int32)
    passes.gradient_limbs(tensor(dy), tensor(w_e), tensor(x_e), grain, rows, rows_e, columns, columns_e, status())
    folded = [
        dy * reference.power_of_two(w_e.astype(np.int64)),
        dy * reference.power_of_two(x_e.astype(np.int64))[:, None],
    ]
    same_limbs(rows, rows_e, reference.operand(folded[0], limbs))
    for index in range(grains):
        part = slice(index * grain, (index + 1) * grain)
        expected = reference.operand(np.ascontiguousarray(folded[1][part].T), limbs)
        same_limbs(columns[:, part].mT, columns_e[index], expected)


@examples
@given(tokens=row_counts, width=sizes, grain=st.integers(1, 80), seed=st.integers(0, 99), keep=st.booleans())
def test_rms_norm(passes: Passes, tokens: int, width: int, grain: int, seed: int, keep: bool) -> None:
    x, dy, gain, dx = (
        moderate(seed, tokens, width),
        moderate(1, tokens, width),
        moderate(2, width),
        moderate(3, tokens, width),
    )
    y, n, r = reference.rms_norm(x, gain, 1e-5)
    planes, e = limbs_of(2, tokens, width)
    found_r = torch.empty(tokens)
    passes.norm_limbs(tensor(x), tensor(gain), rule.f32(1e-5), planes, e, found_r, status())
    same(found_r, r)
    same_limbs(planes, e, reference.operand(y, 2))
    found, d_gain = tensor(dx), tensor(gain)
    passes.norm_gradient(tensor(dy), tensor(x), found_r, tensor(gain), grain, found, d_gain, keep)
    same(found, dx + reference.rms_norm_gradient(dy, n, r, gain))
    expected = gain if keep else None
    for start in range(0, tokens, grain):
        part = reference.sum_by_pairs((dy * n)[start : start + grain])
        expected = part if expected is None else expected + part
    assert expected is not None
    same(d_gain, expected)


@examples
@given(data=st.data(), tokens=row_counts, width=sizes)
def test_swiglu(passes: Passes, data: st.DataObject, tokens: int, width: int) -> None:
    gate, up = data.draw(matrix(tokens, width)), moderate(0, tokens, width)
    dy = moderate(1, tokens, width)
    both = tensor(np.concatenate([gate, up], 1))
    planes, e = limbs_of(2, tokens, width)
    passes.swiglu_limbs(both, planes, e, status())
    same_limbs(planes, e, reference.operand(reference.swiglu(gate, up), 2))
    passes.swiglu_gradient(tensor(dy), both)
    same(both, np.concatenate(reference.swiglu_gradient(dy, gate, up), 1))


@examples
@given(data=st.data(), tokens=row_counts, vocabulary=sizes)
def test_cross_entropy(passes: Passes, data: st.DataObject, tokens: int, vocabulary: int) -> None:
    logits = data.draw(matrix(tokens, vocabulary))
    targets = data.draw(hnp.arrays(np.int64, tokens, elements=st.integers(0, vocabulary - 1)))
    losses, gradient = reference.cross_entropy(logits, targets, rule.f32(1 / 7))
    found, found_losses = tensor(logits), torch.empty(tokens)
    passes.cross_entropy(found, tensor(targets), rule.f32(1 / 7), found_losses)
    same(found_losses, losses)
    same(found, gradient)


@examples
@given(data=st.data(), tokens=sizes, width=row_counts, keep=st.booleans())
def test_embedding(passes: Passes, data: st.DataObject, tokens: int, width: int, keep: bool) -> None:
    dx = data.draw(matrix(tokens, width))
    rows = data.draw(hnp.arrays(np.int64, tokens, elements=st.integers(0, 8)))
    start = moderate(0, 9, width)
    out = tensor(start)
    passes.embedding_gradient(tensor(dx), tensor(rows), out, keep, status())
    gradient = reference.embedding_gradient(dx, rows, 9)
    same(out, start + gradient if keep else gradient)


@examples
@given(
    group=st.integers(1, 3),
    positions=st.one_of(st.integers(1, 20), st.just(40)),
    half=st.integers(1, 6),
    limbs=limb_counts,
    seed=st.integers(0, 99),
)
def test_attention(passes: Passes, group: int, positions: int, half: int, limbs: int, seed: int) -> None:
    size, rows, scale = 2 * half, group * positions, rule.f32(0.3)
    qkv = moderate(seed, positions, (group + 2) * size)
    cos, sin = rule.rotary_tables(10_000.0, size, positions)
    parts = np.split(qkv, group + 2, axis=1)
    q = np.concatenate([reference.rotate(part, cos, sin) for part in parts[:group]])
    k, v = reference.rotate(parts[group], cos, sin), np.ascontiguousarray(parts[group + 1].T)
    head = reference.Attention(*(reference.operand(x, limbs) for x in (q, k, v)), scale, limbs)

    def int8(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int8)

    def int32(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32)

    q8, k8, v8 = int8(1, limbs, rows, size), int8(1, limbs, positions, size), int8(1, limbs, positions, size)
    q_e, k_e, v_e = int32(1, rows), int32(1, positions), int32(1, size)
    passes.heads(tensor(qkv), tensor(cos), tensor(sin), q8, q_e, k8, k_e, v8, v_e, status())
    same_limbs(q8[0], q_e[0], head.q)
    same_limbs(k8[0], k_e[0], head.k)
    same_limbs(v8[0].mT, v_e[0], head.v)

    products = Products(passes, multiply_int8, limbs, Scratch(torch.device("cpu")))
    weights, r = int8(limbs, rows, positions), torch.empty(rows)
    passes.softmax_limbs(products.integers(q8[0], k8[0].mT), q_e[0], k_e[0], scale, weights, r)
    expected_weights, expected_r = head.weights()
    same_limbs(
        weights, torch.zeros(rows, dtype=torch.int32), reference.Operand(expected_weights, np.zeros(rows, np.int64))
    )
    same(r, expected_r)
    out = torch.empty(positions, group * size)
    passes.place_heads(products.integers(weights, v8[0]), v_e[0], r, out, 0)
    expected = head.forward()
    same(out, np.concatenate(np.split(expected, group), axis=1))

    d_out = moderate(seed + 1, positions, group * size)
    by_rows, by_rows_e = limbs_of(limbs, rows, size)
    by_columns, by_columns_e, correction = int8(limbs, rows, size), int32(size), torch.empty(rows)
    passes.attended_limbs(
        out, tensor(d_out), 0, v_e[0], r, by_rows, by_rows_e, by_columns, by_columns_e, correction, status()
    )
    d_v, d_q, d_k = torch.empty(positions, size), torch.empty(rows, size), torch.empty(positions, size)
    products(weights.mT, torch.zeros(positions, dtype=torch.int32), by_columns, by_columns_e, d_v)
    s_rows, s_rows_e = limbs_of(limbs, rows, positions)
    s_columns, s_columns_e = int8(limbs, rows, positions), int32(positions)
    s = products.integers(by_rows, v8[0].mT)
    passes.softmax_gradient_limbs(
        *(
            s,
            by_rows_e,
            weights,
            r,
            correction,
            scale,
            q_e[0],
            k_e[0],
            s_rows,
            s_rows_e,
            s_columns,
            s_columns_e,
            status(),
        )
    )
    products(s_rows, s_rows_e, k8[0], None, d_q)
    products(s_columns.mT, s_columns_e, q8[0], None, d_k)
    stacked = np.concatenate(np.split(d_out, group, axis=1))
    found = (d_q, d_k, d_v)
    for mine, theirs in zip(found, head.gradient(expected, stacked), strict=True):
        same(mine, theirs)
    d_qkv = torch.empty(positions, (group + 2) * size)
    passes.place_gradients(*found, tensor(cos), tensor(sin), 0, d_qkv)
    back = [reference.rotate(part, cos, -sin) for part in (*np.split(d_q.numpy(), group), d_k.numpy())]
    same(d_qkv, np.concatenate([*back, d_v.numpy()], axis=1))


def test_a_score_that_overflows_is_noticed(passes: Passes) -> None:
    s = torch.full((4, 4, 4), 1 << 20, dtype=torch.int32)
    high = torch.full((4,), 90, dtype=torch.int32)
    weights, r = torch.empty(2, 4, 4, dtype=torch.int8), torch.empty(4)
    passes.softmax_limbs(s, high, high, 1.0, weights, r)
    assert r.isnan().all()


@examples
@given(size=st.one_of(st.integers(1, 10_000), st.integers(130_000, 150_000)), seed=st.integers(0, 99))
def test_sums_of_squares(passes: Passes, size: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal(size).astype(np.float32)
    assert np.float32(passes.sum_of_squares(tensor(x))) == reference.sum_of_squares(x)


@examples
@given(data=st.data(), width=sizes, factor=st.floats(2**-7, 1.0, width=32), step=st.integers(0, 12))
def test_optimizer_updates(passes: Passes, data: st.DataObject, width: int, factor: float, step: int) -> None:
    p, g = moderate(step, 3, width), data.draw(matrix(3, width))
    m, v = moderate(7, 3, width), np.abs(moderate(8, 3, width))
    scalars = StepScalars.of(OptimizerSpec(weight_decay=0.1), step)
    with np.errstate(over="ignore"):
        expected = reference_step.adamw(p, g * np.float32(factor), m, v, scalars)
        tensors = [tensor(x) for x in (p, g, m, v)]
        passes.adamw(tensors[0], tensors[1], factor, tensors[2], tensors[3], scalars, scalars.adamw_decay)
    for found, theirs in zip((tensors[0], *tensors[2:]), expected, strict=True):
        same(found, theirs)

    held, update = tensor(m), torch.empty(3, width)
    passes.momentum(tensor(g), factor, held, scalars.momentum, update)
    mu = np.float32(scalars.momentum)
    momentum = m * mu + g * np.float32(factor)
    same(held, momentum)
    same(update, g * np.float32(factor) + momentum * mu)

    found = tensor(p)
    passes.descend(found, tensor(m), 0.75, rule.f32(0.3))
    same(found, p * np.float32(0.75) - m * np.float32(0.3))


@examples
@given(data=st.data(), size=sizes, limbs=limb_counts)
def test_the_polynomial_of_newton_schulz(passes: Passes, data: st.DataObject, size: int, limbs: int) -> None:
    gram, square = moderate(0, size, size), data.draw(matrix(size, size))
    fold = data.draw(hnp.arrays(np.int32, size, elements=st.integers(-100, 10)))
    _, b, c = rule.NEWTON_SCHULZ_F32
    planes, e = limbs_of(limbs, size, size)
    passes.polynomial_limbs(tensor(gram), tensor(square), b, c, tensor(fold), planes, e, status())
    scales = reference.power_of_two(fold.astype(np.int64))
    same_limbs(planes, e, reference.operand((gram * np.float32(b) + square * np.float32(c)) * scales[None, :], limbs))
