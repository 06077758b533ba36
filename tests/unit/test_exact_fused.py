"""The Triton kernels are right as far as that can be known without a GPU: in Triton's interpreter, and in their machine code.

`test_exact_passes.py` holds them against the reference on small shapes; here are shapes that take several programs, turns of
loops and levels of sums, the whole self-test, and the code for two kinds of GPU.
"""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from swarm_protocol.exact import eager, rule, segment
from swarm_protocol.exact.backend import Backend
from swarm_protocol.exact.products import multiply_int8
from swarm_protocol.exact.rule import StepScalars
from swarm_protocol.spec import OptimizerSpec

ROUNDED = {"add.rn.f32", "sub.rn.f32", "mul.rn.f32", "div.rn.f32", "sqrt.rn.f32"}
CONVERTED = {"cvt.rn.f32.s16", "cvt.rn.f32.s32", "cvt.rn.f32.s64"}
NOT_ROUNDED = {"abs.f32", "neg.f32", "max.f32", "min.f32", "selp.f32", "mov.f32"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Shape:
    """Of a model and a micro-batch; there are as many sequences as fit the tokens."""

    limbs: int
    tokens: int
    grain: int
    width: int
    intermediate: int
    vocabulary: int
    positions: int
    head: int
    group: int
    kv_heads: int


class Arguments:
    """Tensors with values that differ in size by rows."""

    def __init__(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(seed)

    def floats(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self._random)
        return x * torch.exp2(self.integers(-20, 20, shape[0]).float()).view(-1, *[1] * (len(shape) - 1))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self._random, dtype=torch.int32)

    def exponents(self, *shape: int) -> Tensor:
        return self.integers(-6, 7, *shape)

    def products(self, limbs: int, *shape: int) -> Tensor:
        return self.integers(-(1 << 16), 1 << 16, limbs * limbs, *shape)

    def of(self, shape: Shape) -> dict[str, list[Any]]:
        """For every pass."""
        limbs, tokens, width, size = shape.limbs, shape.tokens, shape.width, shape.head
        positions, rows = shape.positions, shape.group * shape.positions
        sequences, heads = tokens // positions, shape.kv_heads
        grains, all_heads = -(-tokens // shape.grain), (shape.group + 2) * heads * size
        status, square = torch.zeros(1, dtype=torch.int32), min(width, 200)
        scalars = StepScalars.of(OptimizerSpec(weight_decay=0.1), 3)
        cos, sin = (torch.from_numpy(table) for table in rule.rotary_tables(10_000.0, size, positions))

        def planes(count: int, *matrix: int) -> Tensor:
            return torch.zeros(count, *matrix, dtype=torch.int8)

        def exponents(*of: int) -> Tensor:
            return torch.zeros(of, dtype=torch.int32)

        x, gate_up = self.floats(tokens, width), self.floats(tokens, 2 * shape.intermediate)
        e, sums = exponents(tokens), self.floats(rows).abs()
        weights = self.integers(-64, 65, limbs, rows, positions).to(torch.int8)
        targets = self.integers(0, shape.vocabulary, tokens).long()
        counts = [planes(sequences * heads, limbs, n, size) for n in (rows, positions, positions)]
        counts_e = [exponents(sequences * heads, n) for n in (rows, positions, size)]
        many, width_e = rule.head_limbs(limbs), self.exponents(width)
        gradient = [planes(many, tokens, width), e, planes(limbs, tokens, width), exponents(grains, width)]
        folds = width_e, self.exponents(tokens)
        out, d_out = (self.floats(positions, heads * shape.group * size) for _ in range(2))
        by_rows = planes(limbs, rows, size), exponents(rows), planes(limbs, rows, size), exponents(size)
        column = (heads - 1) * shape.group * size
        return {
            "finish": [self.products(limbs, tokens, width), self.exponents(tokens), width_e, x, 0.5],
            "limbs": [x, planes(limbs, tokens, width), e, status],
            "gradient_limbs": [x, *folds, shape.grain, *gradient, status],
            "norm_limbs": [
                x,
                self.floats(width),
                rule.f32(1e-5),
                planes(limbs, tokens, width),
                e,
                self.floats(tokens),
                status,
            ],
            "norm_gradient": [x, x, x[:, 0].clone(), width_e.float(), shape.grain, x.clone(), x[0].clone(), True],
            "swiglu_limbs": [gate_up, planes(limbs, tokens, shape.intermediate), e, status],
            "swiglu_gradient": [self.floats(tokens, shape.intermediate), gate_up],
            "cross_entropy": [self.floats(tokens, shape.vocabulary), targets, rule.f32(1 / 7), self.floats(tokens)],
            "heads": [
                self.floats(tokens, all_heads),
                *(cos, sin, counts[0], counts_e[0], counts[1], counts_e[1], counts[2], counts_e[2], status),
            ],
            "softmax_limbs": [
                self.products(limbs, rows, positions),
                *(self.exponents(rows), self.exponents(positions), rule.f32(0.3), weights, sums),
            ],
            "place_heads": [self.products(limbs, rows, size), self.exponents(size), sums, out, column],
            "attended_limbs": [out, d_out, column, self.exponents(size), sums, *by_rows, self.floats(rows), status],
            "softmax_gradient_limbs": [
                self.products(limbs, rows, positions),
                *(self.exponents(rows), weights, sums, self.floats(rows), rule.f32(0.3)),
                *(self.exponents(rows), self.exponents(positions), planes(limbs, rows, positions), exponents(rows)),
                *(planes(limbs, rows, positions), exponents(positions), status),
            ],
            "place_gradients": [
                *(self.floats(rows, size), self.floats(positions, size), self.floats(positions, size)),
                *(cos, sin, heads - 1, self.floats(positions, all_heads)),
            ],
            "embedding_gradient": [x, targets, self.floats(shape.vocabulary, width), True, status],
            "sum_of_squares": [x],
            "adamw": [x, self.floats(tokens, width), 0.5, x.clone(), x.abs(), scalars, 0.75],
            "momentum": [x, 0.5, self.floats(tokens, width), rule.f32(0.9), torch.zeros(tokens, width)],
            "polynomial_limbs": [
                *(self.floats(square, square), self.floats(square, square), -4.775, rule.f32(2.0315)),
                *(self.exponents(square), planes(limbs, square, square), exponents(square), status),
            ],
            "descend": [x, self.floats(tokens, width), 0.75, rule.f32(0.3)],
        }


def equal_to_torch(fused: Any, shape: Shape, seed: int) -> None:
    """Every pass leaves the same bits in every tensor that it was given."""
    given, expected = Arguments(seed).of(shape), Arguments(seed).of(shape)
    for name, arguments in given.items():
        # Passes share tensors, and read what earlier ones wrote: the first to differ is the one that is wrong.
        result = getattr(eager, name)(*expected[name])  # first, because it refuses wrong sizes
        assert getattr(fused, name)(*arguments) == result, name
        for index, (found, right) in enumerate(zip(arguments, expected[name], strict=True)):
            if isinstance(right, Tensor):
                assert np.array_equal(found.numpy().view(np.uint8), right.numpy().view(np.uint8)), (name, index)


SMALL = Shape(2, 24, 8, 20, 18, 50, 8, 6, 2, 2)
LARGE = Shape(3, 16, 12, 1100, 1200, 9000, 8, 70, 3, 2)
MODEL = Shape(2, 512, 256, 768, 2048, 32000, 256, 64, 3, 4)


@pytest.mark.parametrize(("limbs", "grain"), [(2, 8), (3, 16), (2, 24)])
def test_many_programs_and_turns_give_the_bits_of_one(
    fused_interpreted: Any, monkeypatch: pytest.MonkeyPatch, limbs: int, grain: int
) -> None:
    for name, value in {"TILE": 16, "_PARTIAL": 4, "_LINES": 2, "_ELEMENTS": 16}.items():
        monkeypatch.setattr(fused_interpreted, name, value)
    equal_to_torch(fused_interpreted, replace(SMALL, limbs=limbs, grain=grain), grain)


def test_tiles_of_their_real_size_give_the_bits_of_torch(fused_interpreted: Any) -> None:
    equal_to_torch(fused_interpreted, LARGE, 0)


def test_rows_too_long_for_a_program_are_left_to_torch(fused_interpreted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_interpreted, "WIDEST", 16)
    equal_to_torch(fused_interpreted, SMALL, 0)


@pytest.mark.parametrize("grain", [1, 2, 3])
def test_a_sum_of_negative_zeros_keeps_its_sign(fused_interpreted: Any, grain: int) -> None:
    x, dy, r, gain = torch.ones(6, 3), torch.full((6, 3), -0.0), torch.ones(6), torch.ones(3)
    found = []
    for passes in (eager, fused_interpreted):
        gain_gradient = torch.empty(3)
        passes.norm_gradient(dy, x, r, gain, grain, torch.zeros(6, 3), gain_gradient, False)
        found.append(gain_gradient.view(torch.int32))
    assert torch.equal(*found)


def test_the_self_test_passes_in_the_interpreter(fused_interpreted: Any) -> None:
    assert segment.self_test_hash(Backend(multiply_int8, fused_interpreted), "cpu") == segment.SELF_TEST_HASH


def test_a_kernel_that_does_not_compile_is_a_runtime_error(fused_for_gpus: Any) -> None:
    """So that the self-test goes on to torch's passes."""
    errors = importlib.import_module("triton.errors")

    class Broken:
        __name__ = "limbs"

        def __getitem__(self, _grid: object) -> Callable[..., None]:
            def run(*_arguments: object, **_constants: object) -> None:
                raise errors.TritonError("no such instruction")

            return run

    with pytest.raises(RuntimeError, match=r"limbs does not run here.*no such instruction"):
        fused_for_gpus.rows.launch(Broken(), (1,), torch.zeros(1))


# --- Machine code


class NoGpu:
    """What Triton asks a driver before it compiles."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return int(self._target.arch)

    def get_current_stream(self, _device: int) -> int:
        return 0


@pytest.fixture(scope="module")
def compile_for(
    fused_for_gpus: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[int, Callable[[Any], None]], list[Any]]]:
    """`compile_for(90, calls)` compiles what `calls(passes)` launches for sm_90, as it is launched, and returns it."""
    compiler, driver = (importlib.import_module(f"triton.{name}") for name in ("backends.compiler", "runtime.driver"))
    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))

        def compiled(capability: int, calls: Callable[[Any], None]) -> list[Any]:
            found: dict[str, Any] = {}

            class Warm:
                def __init__(self, kernel: Any) -> None:
                    self.kernel = kernel

                def __getitem__(self, grid: Any) -> Callable[..., None]:
                    def compile_only(*arguments: Any, **constants: Any) -> None:
                        kernel = self.kernel.warmup(*arguments, grid=grid, **constants)
                        found[kernel.hash] = kernel

                    return compile_only

            def launch(kernel: Any, *arguments: Any, **constants: Any) -> None:
                fused_for_gpus.rows.launch(Warm(kernel), *arguments, **constants)

            patch.setattr(driver.driver, "_active", NoGpu(compiler.GPUTarget("cuda", capability, 32)))
            patch.setattr(fused_for_gpus, "launch", launch)
            calls(fused_for_gpus)
            return list(found.values())

        yield compiled


def everything(fused: Any) -> None:
    for limbs in (2, 3):
        for name, arguments in Arguments(0).of(replace(MODEL, limbs=limbs)).items():
            getattr(fused, name)(*arguments)
            if name in ("finish", "norm_gradient"):  # whose kernels also come without what is kept
                getattr(fused, name)(*arguments[:-1], 0.0 if name == "finish" else False)


def float_operations(ptx: str) -> set[str]:
    """Instructions that take or make floating-point numbers, but comparisons; and all that flush or approximate."""
    names = {
        found[1]
        for statement in re.split(r"[\n;{}]", ptx)
        if (found := re.match(r"\s*(?:@!?%\w+\s+)?([a-z][\w.:]*)", statement))
    }
    number = r"\.(b?f|tf)\d|approx|ftz|\.e[45]m"
    return {name for name in names if re.search(number, name) and not re.fullmatch(r"setp\.\w+\.f32", name)}


def lengths_of_sums(ir: str) -> list[int]:
    """Of the axes over which floats are added by a reduction, whose order is Triton's own."""
    lengths = []
    for reduction in ir.split('"tt.reduce"')[1:]:
        end = re.search(r"\}\) : \(tensor<([\dx]+)x(\w+)", reduction)
        axis = re.search(r"axis = (\d+)", reduction)
        assert end is not None
        assert axis is not None
        if end[2] == "f32" and "arith.maxnumf" not in reduction[: end.start()]:
            lengths.append(int(end[1].split("x")[int(axis[1])]))
    return lengths


def machine_code(kernel: Any, folder: Path) -> list[str]:
    """Names of the instructions that ptxas made."""
    file = folder / "kernel.cubin"
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(importlib.import_module("triton").__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", file], check=True, capture_output=True, text=True).stdout
    return re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_kernels_round_every_operation_once(compile_for: Any, capability: int, tmp_path: Path) -> None:
    kernels = compile_for(capability, everything)
    assert len({kernel.metadata.name for kernel in kernels}) > 20
    used: set[str] = set()
    summed = False
    for kernel in kernels:
        ptx, name = kernel.asm["ptx"], kernel.metadata.name
        assert not kernel.metadata.enable_fp_fusion
        operations = float_operations(ptx)
        assert operations <= ROUNDED | CONVERTED | NOT_ROUNDED, name
        sums = lengths_of_sums(kernel.asm["ttir"])
        assert set(sums) <= {2}, f"{name} adds floats in Triton's order"
        assert lengths_of_sums(kernel.asm["ttgir"]) == sums, f"Triton changed the sums of {name}"
        summed |= bool(sums)
        assert not re.search(r"add\.rn\.f32.*, 0f00000000;", ptx), f"{name} adds 0, which changes the sign of a zero"
        instructions = machine_code(kernel, tmp_path)
        assert any(instruction.startswith("EXIT") for instruction in instructions)
        fused = [i for i in instructions if i.startswith(("FFMA", "FMUL.FTZ", "FADD.FTZ"))]
        # Ptxas makes divisions and roots of fused steps, correctly rounded.
        assert bool(fused) == bool(operations & {"div.rn.f32", "sqrt.rn.f32"}), name
        used |= operations
    assert used >= ROUNDED
    assert summed


def test_without_the_option_triton_would_fuse(
    compile_for: Any, fused_for_gpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above is known to see it."""
    rows, arguments = fused_for_gpus.rows, Arguments(0).of(SMALL)["momentum"]
    source = rows.launch

    def careless(warm: Any, grid: Any, *given: Any, warps: int = 4, **constants: Any) -> None:
        warm[grid](*given, **constants, num_warps=warps)

    monkeypatch.setattr(rows, "launch", careless)
    (kernel,) = compile_for(90, lambda fused: fused.momentum(*arguments))
    assert "fma.rn.f32" in float_operations(kernel.asm["ptx"])
    monkeypatch.setattr(rows, "launch", source)
    (kernel,) = compile_for(90, lambda fused: fused.momentum(*arguments))
    assert "fma.rn.f32" not in float_operations(kernel.asm["ptx"])
