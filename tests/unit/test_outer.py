"""The outer step is one sequence of float32 roundings."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from swarm_protocol import outer
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.outer import outer_step
from swarm_protocol.spec import OuterSpec

Float32 = npt.NDArray[np.float32]
triples = hnp.arrays(
    np.float32, st.tuples(st.just(3), st.integers(0, 20)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


def vector(*values: float) -> Float32:
    return np.array(values, np.float32)


@given(triple=triples, lr=st.floats(0.1, 2.0), mu=st.floats(0.0, 0.99))
def test_every_operation_is_rounded_on_its_own(triple: Float32, lr: float, mu: float) -> None:
    spec = OuterSpec(lr=lr, momentum=mu)
    parameters, momentum = outer_step(spec, *triple)
    lr32, mu32 = np.float32(lr), np.float32(mu)
    for at, (theta, v, d) in enumerate(triple.T):
        v = mu32 * v + d
        theta = theta - lr32 * (d + mu32 * v)
        assert (parameters[at].tobytes(), momentum[at].tobytes()) == (theta.tobytes(), v.tobytes())


def test_it_is_the_nesterov_of_torch_up_to_rounding() -> None:
    spec = OuterSpec(lr=0.7, momentum=0.9)
    rng = np.random.default_rng(1)
    theta = rng.standard_normal(100).astype(np.float32)
    v = np.zeros(100, np.float32)
    theirs = torch.from_numpy(theta.copy()).requires_grad_()
    reference = torch.optim.SGD([theirs], lr=0.7, momentum=0.9, nesterov=True)
    for _ in range(5):
        d = rng.standard_normal(100).astype(np.float32)
        theta, v = outer_step(spec, theta, v, d)
        theirs.grad = torch.from_numpy(d.copy())
        reference.step()
    np.testing.assert_allclose(theta, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_without_momentum_and_at_rate_one_it_is_the_average_of_the_nodes() -> None:
    theta, _ = outer_step(OuterSpec(lr=1.0, momentum=0.0), vector(1.0), vector(0.0), vector(0.25))
    assert theta.tolist() == [0.75]


def test_the_momentum_of_a_missing_part_runs_on() -> None:
    theta, v = outer_step(OuterSpec(lr=1.0, momentum=0.5), vector(1.0, 1.0), vector(0.5, -0.0), np.zeros(2, np.float32))
    assert theta.tolist() == [0.875, 1.0]
    assert v.tobytes() == vector(0.25, 0.0).tobytes()  # -0 + 0 is +0


def test_what_is_given_is_not_written_to() -> None:
    given_vectors = [vector(1.0), vector(2.0), vector(3.0)]
    outer_step(OuterSpec(), *given_vectors)
    assert [x.tolist() for x in given_vectors] == [[1.0], [2.0], [3.0]]


def test_slabs_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    triple = np.random.default_rng(3).standard_normal((3, 1000)).astype(np.float32)
    whole = outer_step(OuterSpec(), *triple)
    monkeypatch.setattr(outer, "_SLAB_ELEMENTS", 64)
    assert [x.tobytes() for x in outer_step(OuterSpec(), *triple)] == [x.tobytes() for x in whole]


@pytest.mark.parametrize("wrong", [vector(1.0), np.ones(2), np.ones((2, 1), np.float32)])
def test_vectors_that_do_not_fit_are_refused(wrong: Float32) -> None:
    with pytest.raises(InvalidDataError, match="takes three"):
        outer_step(OuterSpec(), vector(1.0, 1.0), vector(1.0, 1.0), wrong)


@pytest.mark.parametrize("d", [3.4e38, math.nan, -math.inf])
def test_leaving_the_finite_numbers_is_an_error(d: float) -> None:
    with pytest.raises(InvalidDataError, match="finite"):
        outer_step(OuterSpec(lr=10.0), vector(1.0), vector(0.0), vector(d))


def test_the_bits_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    base = np.arange(8, dtype=np.int64)
    triple = [((base * factor % 97 - 48) * np.float32(0.1)).astype(np.float32) for factor in (7, 31, 53)]
    found: dict[str, object] = {}
    for name, spec in {"default": OuterSpec(), "0.7 and 0.9": OuterSpec(lr=0.7, momentum=0.9)}.items():
        parameters, momentum = outer_step(spec, *triple)
        found[name] = {
            "parameters": parameters.astype("<f4").tobytes().hex(),
            "momentum": momentum.astype("<f4").tobytes().hex(),
        }
    golden("outer", found)
