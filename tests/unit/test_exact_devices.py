"""What exact training asks of a device it has never met: only torch operations whose float32 result is defined."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swarm_protocol.exact import Trainer, backend, eager, segment
from swarm_protocol.exact.backend import Backend
from swarm_protocol.exact.passes import Passes
from swarm_protocol.exact.products import Multiply, multiply_float, multiply_int8, padded_for_cuda
from swarm_protocol.spec import OptimizerSpec, RunSpec
from swarm_protocol.training import Tokens

ROUNDED_ONCE = {"add", "add_", "sub", "rsub", "mul", "mul_", "div", "round", "_to_copy"}
MOVED = {
    *("alias", "arange", "cat", "clone", "copy_", "detach", "empty", "full_like", "gather", "index", "index_put_"),
    *("index_select", "lift_fresh", "masked_fill", "nan_to_num", "new_zeros", "ones_like", "repeat", "scatter_"),
    *("select", "slice", "split", "transpose", "unbind", "unsqueeze", "_unsafe_view", "view", "where", "zero_"),
    *("zeros", "zeros_like", "_local_scalar_dense"),
}
EXACT = {"abs", "amax", "clamp", "clamp_min", "ge", "le", "lt", "max", "maximum", "neg", "_int_mm", "mm"}
INTEGERS = {"__lshift__", "__rshift__", "bitwise_and", "bitwise_not", "bitwise_or", "index_add_", "sum", "_unique2"}


class Operations(TorchDispatchMode):
    """Notes every operation, and those with arguments that docs/numerics.md does not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.wrong: list[str] = []

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::").partition(".")[0]
        self.names.add(name)
        floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in args)
        if name in INTEGERS and floats:
            self.wrong.append(f"{name} of floats")
        if name == "div" and not (isinstance(args[1], Tensor) and args[1].ndim):
            self.wrong.append("division by a number, which CUDA turns into a multiplication")
        if "alpha" in (kwargs or {}):
            self.wrong.append(f"{name} with alpha")
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(optimizer: OptimizerSpec) -> RunSpec:
    spec = segment.self_test_spec()
    return spec.model_copy(update={"training": spec.training.model_copy(update={"optimizer": optimizer})})


def batch(step: int) -> Tokens:
    return np.random.default_rng(step).integers(0, 40, (3, 25))


@pytest.mark.parametrize("optimizer", [OptimizerSpec(), OptimizerSpec(name="adamw")], ids=["muon", "adamw"])
@pytest.mark.parametrize("multiply", [multiply_int8, multiply_float])
def test_the_torch_passes_use_only_operations_whose_result_is_defined(
    multiply: Multiply, optimizer: OptimizerSpec
) -> None:
    spec = tiny(optimizer)
    trainer = Trainer(spec, grain_sequences=1, backend=Backend(multiply, eager))
    with Operations() as operations:
        trainer.run(segment.self_test_state(spec), batch, 2)
    assert operations.names - ROUNDED_ONCE - MOVED - EXACT - INTEGERS == set()
    assert operations.wrong == []


def test_products_padded_for_a_gpu_train_to_the_same_bits() -> None:
    def multiply_padded(a: Tensor, b: Tensor, out: Tensor) -> None:
        rows, columns = padded_for_cuda(a, b)
        out.copy_(torch._int_mm(rows, columns)[: len(a), : b.shape[1]])

    assert segment.self_test_hash(Backend(multiply_padded, eager), "cpu") == segment.SELF_TEST_HASH


@pytest.mark.parametrize("name", ["eager", "compiled"])
def test_what_a_gpu_is_asked_of_a_wide_model_is_what_cpus_give(name: str) -> None:
    if name == "compiled":
        pytest.importorskip("numba", reason="numba is optional")
    passes = cast(Passes, importlib.import_module(f"swarm_protocol.exact.{name}"))
    assert segment.wide_hash(Backend(multiply_int8, passes), "cpu") == segment.WIDE_HASH


@pytest.mark.parametrize(
    ("cuda", "expected"), [("13.0", ["triton", "triton", "torch", "torch"]), (None, ["torch", "torch"])]
)
def test_triton_comes_first_on_nvidias_gpus(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(backend, "_seconds", lambda _kind, _device: 0.0)
    monkeypatch.setitem(sys.modules, "swarm_protocol.exact.fused", None)
    assert [one.passes.name for one in backend.candidates("cuda")] == ["torch", "torch"]
    fused = SimpleNamespace(name="triton")
    monkeypatch.setitem(sys.modules, "swarm_protocol.exact.fused", fused)
    monkeypatch.setattr("swarm_protocol.exact.fused", fused, raising=False)
    assert [one.passes.name for one in backend.candidates("cuda:1")] == expected
    assert "triton" not in [one.passes.name for one in backend.candidates("cpu")]


def _cannot_run(*_arguments: object) -> None:
    raise RuntimeError("the kernel limbs does not run here")


def _off_by_one_bit(x: Tensor, planes: Tensor, e: Tensor, status: Tensor) -> None:
    eager.limbs(x, planes, e, status)
    planes[-1, 0, 0] ^= 1


@pytest.mark.parametrize("limbs", [_cannot_run, _off_by_one_bit])
def test_kernels_that_do_not_run_or_differ_give_way_to_torch(monkeypatch: pytest.MonkeyPatch, limbs: Any) -> None:
    wrong = SimpleNamespace(**vars(eager) | {"name": "wrong", "limbs": limbs})
    both = [Backend(multiply_int8, cast(Passes, wrong)), Backend(multiply_int8, eager)]
    monkeypatch.setattr(segment, "candidates", lambda _device: iter(both))
    assert segment._passes_self_test("cpu", 1) is both[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_backend_of_a_gpu_passes_the_self_test() -> None:
    for one in backend.candidates("cuda"):
        assert segment.self_test_hash(one, "cuda") == segment.SELF_TEST_HASH, one.name
        assert segment.wide_hash(one, "cuda") == segment.WIDE_HASH, one.name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", [OptimizerSpec(), OptimizerSpec(name="adamw")], ids=["muon", "adamw"])
def test_a_gpu_ends_in_the_same_state(optimizer: OptimizerSpec) -> None:
    spec = tiny(optimizer)
    ends = [
        Trainer(spec, device=device, grain_sequences=1).run(segment.self_test_state(spec), batch, 5)
        for device in ("cpu", "cuda")
    ]
    assert segment.hash_of_states(ends[0]) == segment.hash_of_states(ends[1])
