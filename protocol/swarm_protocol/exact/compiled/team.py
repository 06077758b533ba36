"""Tasks of a kernel on the threads that torch computes its products with.

A kernel names a body and a number of tasks; the tasks go to whichever thread is free, so they write to places of their own,
and no result depends on how many threads there are. The threads are those of the OpenMP runtime that torch is linked with:
a second pool beside it would fight with torch's threads for the cores, since these spin for a while after every product.
Where torch is built without that runtime the calling thread does all tasks.
"""

from __future__ import annotations

import ctypes
import importlib
from functools import cache
from pathlib import Path
from typing import Any

import torch

_extending: Any = importlib.import_module("numba.extending")
_ir: Any = importlib.import_module("llvmlite.ir")
_cgutils: Any = importlib.import_module("numba.core.cgutils")

WORTH_SHARING = 1 << 14
"""A pass over fewer elements takes little longer than waking the threads."""

Team = tuple[int, int]
"""Where the runtime's fork is (0: nowhere), and how many threads to fork into, at least 1."""


def team_for(elements: int) -> Team:
    """For a pass over so many elements: all of torch's threads or one, since the runtime ends threads that sit one out."""
    threads = torch.get_num_threads() if elements >= WORTH_SHARING else 1
    fork = _fork_address() if threads > 1 else 0
    return fork, threads if fork else 1


@cache
def _fork_address() -> int:
    """`GOMP_parallel(function, data, threads, flags)` of the OpenMP runtime that torch itself uses."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        return ctypes.cast(ctypes.CDLL(str(library)).GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        return 0


@_extending.intrinsic  # type: ignore[untyped-decorator]
def share(typing_context: Any, body: Any, team: Any, tasks: Any, arguments: Any) -> Any:
    """Call the kernel `body(task, *arguments)` for every task from 0 to `tasks` - 1, in no order."""
    types = importlib.import_module("numba").types
    inner = body.get_call_type(typing_context, (types.int64, *arguments.types), {})
    return types.void(body, team, types.int64, arguments), lambda *code: _lower_share(inner, *code)


def _lower_share(inner: Any, context: Any, builder: Any, signature: Any, values: Any) -> Any:
    """One function that takes tasks from a counter until there are none, called here or by every thread of the team."""
    compiled = signature.args[0].dispatcher.get_compile_result(inner)
    context.add_linking_libs([compiled.library])
    word, half, pointer = _ir.IntType(64), _ir.IntType(32), _ir.IntType(8).as_pointer()
    _, team, tasks, arguments = values
    shared_type = _ir.LiteralStructType([word, word, arguments.type, half])
    shared = _cgutils.alloca_once(builder, shared_type)
    for index, value in enumerate((word(0), tasks, arguments, half(0))):
        builder.store(value, _cgutils.gep_inbounds(builder, shared, 0, index))

    name = builder.module.get_unique_name(f"{builder.function.name}.tasks")
    function = _ir.Function(builder.module, _ir.FunctionType(_ir.VoidType(), [pointer]), name)
    function.linkage = "internal"
    inside = _ir.IRBuilder(function.append_basic_block("entry"))
    own = inside.bitcast(function.args[0], shared_type.as_pointer())
    loop, work, failed, end = (function.append_basic_block(name) for name in ("loop", "work", "failed", "end"))
    inside.branch(loop)
    inside.position_at_end(loop)
    task = inside.atomic_rmw("add", _cgutils.gep_inbounds(inside, own, 0, 0), word(1), "monotonic")
    count = inside.load(_cgutils.gep_inbounds(inside, own, 0, 1))
    inside.cbranch(inside.icmp_signed("<", task, count), work, end)
    inside.position_at_end(work)
    given = _cgutils.unpack_tuple(inside, inside.load(_cgutils.gep_inbounds(inside, own, 0, 2)))
    callee = context.declare_function(builder.module, compiled.fndesc)
    status, _ = context.call_conv.call_function(inside, callee, inner.return_type, inner.args, [task, *given])
    inside.cbranch(status.is_error, failed, loop)
    inside.position_at_end(failed)
    inside.store(half(1), _cgutils.gep_inbounds(inside, own, 0, 3))
    inside.branch(end)
    inside.position_at_end(end)
    inside.ret_void()

    fork, threads = _cgutils.unpack_tuple(builder, team)
    data = builder.bitcast(shared, pointer)
    with builder.if_else(builder.icmp_signed(">", threads, threads.type(1))) as (many, one):
        with many:
            kind = _ir.FunctionType(_ir.VoidType(), [function.type, pointer, half, half])
            start = builder.inttoptr(fork, kind.as_pointer())
            builder.call(start, [function, data, builder.trunc(threads, half), half(0)])
        with one:
            builder.call(function, [data])
    with builder.if_then(_cgutils.is_not_null(builder, builder.load(_cgutils.gep_inbounds(builder, shared, 0, 3)))):
        context.call_conv.return_user_exc(builder, MemoryError, ("no memory for a pass of exact training",))
    return context.get_dummy_value()
