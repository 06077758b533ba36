"""The layout document names every byte of a checkpoint, and its manifest is the same record for everybody."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from swarm_protocol import encoding, layout
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import CHUNK_BYTES, content_hash
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.model.shapes import trainable_shapes
from swarm_protocol.spec import ParentSpec, RunSpec


def test_the_layout_names_every_byte_in_order(run_spec: RunSpec) -> None:
    spec = run_spec
    document = encoding.decode(layout.layout(spec), max_bytes=1 << 20)
    assert isinstance(document, list)
    tensors: list[Any] = document
    assert [group for group, *_ in tensors] == ["parameters"] * (len(tensors) // 2) + ["momentum"] * (len(tensors) // 2)
    assert {dtype for *_, dtype, _ in tensors} == {"float32"}
    assert [(name, shape) for _, name, _, shape in tensors[: len(tensors) // 2]] == [
        (name, list(shape)) for name, shape in trainable_shapes(spec.model, spec.trainable).items()
    ]
    checkpoint = Checkpoint.initial(np.zeros(spec.model.num_parameters, np.float32))
    size_bytes = sum(4 * math.prod(shape) for *_, shape in tensors)
    assert size_bytes == layout.checkpoint_bytes(spec) == checkpoint.manifest.size_bytes


def test_layout_and_manifest_are_pinned(run_spec: RunSpec, golden: Callable[[str, dict[str, object]], None]) -> None:
    spec = run_spec
    first = layout.checkpoint_manifest(spec, 0, bytes.fromhex(spec.checkpoint), layout.parent_of_first(spec))
    second = layout.checkpoint_manifest(spec, 1, b"r" * 32, first.root)
    golden(
        "layout",
        {
            "run": spec.run_id.hex(),
            "layout": layout.layout(spec).hex(),
            "layout_hash": layout.layout_hash(spec).hex(),
            "manifests": [record.hash.hex() for record in (first, second)],
        },
    )
    assert layout.layout_hash(spec) == content_hash(layout.layout(spec))
    assert (first.parent, second.parent, second.chunk_bytes) == (None, first.root, CHUNK_BYTES)


def test_the_first_checkpoint_of_a_child_run_names_that_of_its_parent(run_spec: RunSpec) -> None:
    spec = run_spec.model_copy(update={"parent": ParentSpec(run="11" * 32, round=7, root="22" * 32)})
    assert layout.parent_of_first(spec) == b"\x22" * 32


def test_another_manifest_than_follows_is_named(run_spec: RunSpec) -> None:
    spec = run_spec
    signed = layout.checkpoint_manifest(spec, 3, b"r" * 32, b"p" * 32)
    layout.require_same(spec, signed, b"r" * 32, b"p" * 32)
    for root, parent in ((b"x" * 32, b"p" * 32), (b"r" * 32, b"x" * 32)):
        with pytest.raises(InvalidDataError, match="another manifest of checkpoint 3"):
            layout.require_same(spec, signed, root, parent)
