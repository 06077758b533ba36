"""The transparency log, against the vectors of the Certificate Transparency project and its own proofs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol import log
from swarm_protocol.errors import HashMismatchError
from swarm_protocol.log import Log

# The reference tree of google/certificate-transparency, merkle/merkle_tree_test.
ENTRIES = [
    bytes.fromhex(text)
    for text in ("", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {
    (0, 1): [],
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): [
        "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}
CONSISTENCY = {
    (1, 1): [],
    (1, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


def _log(count: int) -> Log:
    return Log(log.leaf_hash(number.to_bytes(4, "big")) for number in range(count))


def _reference_log() -> Log:
    return Log(map(log.leaf_hash, ENTRIES))


LONG = _log(200)


def test_roots_are_those_of_certificate_transparency() -> None:
    grown = Log()
    assert grown.root() == sha256(b"").digest() == log.EMPTY_ROOT
    for index, (entry, root) in enumerate(zip(ENTRIES, ROOTS, strict=True)):
        assert grown.append(log.leaf_hash(entry)) == index
        assert grown.root().hex() == root
    assert [grown.root(size).hex() for size in range(1, 9)] == ROOTS


@pytest.mark.parametrize(("place", "path"), INCLUSION.items())
def test_inclusion_proofs_are_those_of_certificate_transparency(place: tuple[int, int], path: list[str]) -> None:
    assert [digest.hex() for digest in _reference_log().inclusion_proof(*place)] == path


@pytest.mark.parametrize(("sizes", "path"), CONSISTENCY.items())
def test_consistency_proofs_are_those_of_certificate_transparency(sizes: tuple[int, int], path: list[str]) -> None:
    assert [digest.hex() for digest in _reference_log().consistency_proof(*sizes)] == path


def test_a_longer_log_is_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden(
        "hashing",
        {
            "log root of 200 leaves": LONG.root().hex(),
            "log inclusion proof of leaf 131 of 200": [digest.hex() for digest in LONG.inclusion_proof(131)],
            "log consistency proof from 77 to 200": [digest.hex() for digest in LONG.consistency_proof(77)],
        },
    )


@given(size=st.integers(1, 200), data=st.data())
def test_every_leaf_is_shown_to_be_in_the_log_of_every_size(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    proof = LONG.inclusion_proof(index, size)
    log.verify_inclusion(LONG.leaf(index), index, size, proof, LONG.root(size))


@given(size=st.integers(0, 200), data=st.data())
def test_every_size_is_shown_to_extend_every_earlier_one(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(0, size))
    log.verify_consistency(old, size, LONG.consistency_proof(old, size), LONG.root(old), LONG.root(size))


@given(size=st.integers(2, 200), data=st.data())
def test_a_leaf_that_is_elsewhere_or_not_there_is_not_shown(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    proof, root = LONG.inclusion_proof(index, size), LONG.root(size)
    with pytest.raises(HashMismatchError):
        log.verify_inclusion(log.leaf_hash(b"another entry"), index, size, proof, root)
    with pytest.raises(HashMismatchError):
        log.verify_inclusion(LONG.leaf(index), index ^ 1, size, proof, root)
    with pytest.raises(HashMismatchError):
        log.verify_inclusion(LONG.leaf(index), index, size, proof[:-1], root)
    with pytest.raises(HashMismatchError):
        log.verify_inclusion(LONG.leaf(index), index, size, [*proof, root], root)


@given(size=st.integers(2, 200), data=st.data())
def test_a_rewritten_history_cannot_be_shown_to_be_consistent(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size - 1))
    changed = data.draw(st.integers(0, old - 1))
    rewritten = Log(LONG.leaf(index) if index != changed else log.leaf_hash(b"rewritten") for index in range(size))
    for proof in (rewritten.consistency_proof(old), LONG.consistency_proof(old, size)):
        with pytest.raises(HashMismatchError):
            log.verify_consistency(old, size, proof, LONG.root(old), rewritten.root())


@given(size=st.integers(2, 200), data=st.data())
def test_a_consistency_proof_that_is_cut_or_stretched_is_refused(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size - 1))
    proof = LONG.consistency_proof(old, size)
    for bad in (proof[:-1], proof[1:], (*proof, LONG.root())):
        with pytest.raises(HashMismatchError):
            log.verify_consistency(old, size, bad, LONG.root(old), LONG.root(size))


@pytest.mark.parametrize(
    ("old", "size", "old_root", "root", "proof"),
    [
        (0, 5, LONG.root(1), LONG.root(5), ()),
        (0, 5, log.EMPTY_ROOT, LONG.root(5), (LONG.root(1),)),
        (0, 0, log.EMPTY_ROOT, LONG.root(5), ()),
        (5, 5, LONG.root(4), LONG.root(5), ()),
        (6, 5, LONG.root(6), LONG.root(5), ()),
        (4, 5, LONG.root(4), LONG.root(5), (b"short",)),
    ],
)
def test_the_edges_of_consistency_are_checked_too(
    old: int, size: int, old_root: bytes, root: bytes, proof: tuple[bytes, ...]
) -> None:
    with pytest.raises(HashMismatchError):
        log.verify_consistency(old, size, proof, old_root, root)


def test_a_log_knows_its_bounds() -> None:
    three = _log(3)
    for ask in (
        lambda: three.root(4), lambda: three.inclusion_proof(3), lambda: three.inclusion_proof(2, 2),
        lambda: three.consistency_proof(4), lambda: three.consistency_proof(-1), lambda: three.leaf(3),
    ):  # fmt: skip
        with pytest.raises(IndexError):
            ask()
    with pytest.raises(ValueError, match="32 bytes"):
        three.append(b"an entry instead of its hash")


def test_verifying_needs_nothing_but_the_standard_library() -> None:
    script = "import sys, swarm_protocol.log; print({'numpy', 'blake3', 'torch', 'pydantic'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "set()"
