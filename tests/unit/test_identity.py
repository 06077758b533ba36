"""One key, one PeerID on every plane, and a key file that nobody else reads."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_protocol.errors import ConfigurationError, InvalidDataError, SignatureError
from swarm_protocol.identity import Identity, peer_id, public_key_of, verify

SEED = bytes(range(32))
SEEDS = [bytes(32), SEED, bytes([255]) * 32]

# RFC 8032, section 7.1: seed, public key, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
        "655141438e7a100b",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28d"
        "c027beceea1ec40a",
    ),
]


def test_identities_are_pinned(golden: Callable[[str, dict[str, object]], None]) -> None:
    golden(
        "identity",
        {
            f"seed {seed.hex()}": {
                "public key": Identity.from_seed(seed).public_key.hex(),
                "peer id": Identity.from_seed(seed).peer_id,
                "signature of 'swarm'": Identity.from_seed(seed).sign(b"swarm").hex(),
            }
            for seed in SEEDS
        },
    )


def _in_another_process(script: str) -> list[str]:
    seeds = [seed.hex() for seed in SEEDS]
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *seeds], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.split()


def test_py_libp2p_derives_the_same_peer_ids() -> None:
    script = """
import sys
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID
for seed in sys.argv[1:]:
    print(ID.from_pubkey(create_new_key_pair(bytes.fromhex(seed)).public_key).to_base58())
"""
    assert _in_another_process(script) == [Identity.from_seed(seed).peer_id for seed in SEEDS]


def test_hivemind_reads_our_peer_ids_and_finds_the_public_key_in_them() -> None:
    script = """
import sys
from hivemind.p2p import PeerID
from swarm_protocol.identity import Identity
for seed in sys.argv[1:]:
    peer = PeerID.from_base58(Identity.from_seed(bytes.fromhex(seed)).peer_id)
    print(peer.to_base58(), peer.to_bytes()[-32:].hex())
"""
    expected = [(Identity.from_seed(seed).peer_id, Identity.from_seed(seed).public_key.hex()) for seed in SEEDS]
    assert _in_another_process(script) == [word for pair in expected for word in pair]


@given(st.binary(min_size=32, max_size=32))
def test_a_peer_id_holds_its_public_key(key: bytes) -> None:
    name = peer_id(key)
    assert name.startswith("12D3Koo")
    assert public_key_of(name) == key


@given(st.binary(min_size=32, max_size=32), st.integers(0, 51), st.sampled_from("123456789ABCDEFabcdef0OIlé "))
def test_another_spelling_is_no_peer_id_of_the_same_key(key: bytes, position: int, letter: str) -> None:
    name = peer_id(key)
    changed = name[:position] + letter + name[position + 1 :]
    if changed == name:
        return
    try:
        assert public_key_of(changed) != key
    except InvalidDataError as error:
        assert "PeerID" in str(error)  # noqa: PT017  # either outcome is right, this one must name the trouble


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1",
        "nobody",
        "12D3Koo",
        "1" * 52,
        "z" * 52,
        "z" * 64,
        "Qm" + "Y" * 44,
        "0" * 52,
        "1" * 1_000_000,
        "1" + Identity.from_seed(SEED).peer_id,
        Identity.from_seed(SEED).peer_id + "1",
        " " + Identity.from_seed(SEED).peer_id,
        Identity.from_seed(SEED).peer_id.lower(),
    ],
    ids=lambda text: text[:12],
)
def test_other_text_is_no_peer_id(text: str) -> None:
    with pytest.raises(InvalidDataError, match="PeerID"):
        public_key_of(text)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_public_key_has_32_bytes(length: int) -> None:
    with pytest.raises(InvalidDataError, match="32 bytes"):
        peer_id(bytes(length))


@pytest.mark.parametrize(("seed", "public_key", "message", "signature"), RFC_8032)
def test_signatures_are_those_of_the_rfc(seed: str, public_key: str, message: str, signature: str) -> None:
    identity = Identity.from_seed(bytes.fromhex(seed))
    assert identity.public_key.hex() == public_key
    assert identity.sign(bytes.fromhex(message)).hex() == signature
    verify(identity.public_key, bytes.fromhex(signature), bytes.fromhex(message))


def test_a_signature_fits_one_key_and_one_message() -> None:
    identity, other = Identity.from_seed(SEED), Identity.generate()
    signature = identity.sign(b"message")
    order = 2**252 + 27742317777372353535851937790883648493
    malleable = signature[:32] + (int.from_bytes(signature[32:], "little") + order).to_bytes(32, "little")
    for key, wrong, message in (
        (other.public_key, signature, b"message"),
        (identity.public_key, signature, b"massage"),
        (identity.public_key, other.sign(b"message"), b"message"),
        (identity.public_key, malleable, b"message"),
        (identity.public_key, signature[:-1], b"message"),
        (identity.public_key, b"", b"message"),
        (b"short", signature, b"message"),
        (bytes([255]) * 32, signature, b"message"),
    ):
        with pytest.raises(SignatureError):
            verify(key, wrong, message)


def test_the_key_file_is_the_one_that_hiveminds_daemon_reads(tmp_path: Path) -> None:
    identity = Identity.from_seed(SEED)
    identity.save(tmp_path / "identity")
    assert (tmp_path / "identity").read_bytes() == bytes.fromhex("08011240") + SEED + identity.public_key


def test_the_key_file_is_never_open_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    opened, linked = os.open, os.link

    def watched_open(path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor = opened(path, flags, mode)
        if not flags & os.O_DIRECTORY:
            seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor

    def watched_link(source: Path, target: Path) -> None:
        seen.append(stat.S_IMODE(source.stat().st_mode))
        linked(source, target)

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "link", watched_link)
    before = os.umask(0)
    try:
        Identity.generate().save(tmp_path / "identity")
    finally:
        os.umask(before)
    assert [*seen, stat.S_IMODE((tmp_path / "identity").stat().st_mode)] == [0o600] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["identity"]


def test_an_identity_is_made_once_and_loaded_ever_after(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "identity"
    first = Identity.load_or_create(path)
    raw = path.read_bytes()
    assert Identity.load_or_create(path).peer_id == Identity.load(path).peer_id == first.peer_id
    assert path.read_bytes() == raw


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity"
    first = Identity.load_or_create(path)
    with pytest.raises(ConfigurationError, match="exists"):
        Identity.generate().save(path)
    assert Identity.load(path).seed == first.seed
    assert [found.name for found in tmp_path.iterdir()] == ["identity"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o601])
def test_a_key_file_that_others_may_use_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity"
    Identity.load_or_create(path)
    path.chmod(mode)
    with pytest.raises(ConfigurationError, match=f"chmod 600 {path}"):
        Identity.load_or_create(path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:-1],
        lambda raw: raw + b"\0",
        lambda raw: b"\0" + raw[1:],
        lambda raw: raw[:10] + bytes([raw[10] ^ 1]) + raw[11:],
        lambda raw: raw[:60] + bytes([raw[60] ^ 1]) + raw[61:],
        lambda raw: b"-----BEGIN PRIVATE KEY-----\n" + bytes(40),
    ],
    ids=["empty", "short", "long", "prefix", "seed", "public key", "another format"],
)
def test_a_damaged_key_file_is_refused_and_left_alone(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "identity"
    Identity.load_or_create(path)
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(ConfigurationError, match="backup"):
        Identity.load_or_create(path)
    assert path.read_bytes() == damaged


def test_a_missing_or_unreadable_key_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="No such file"):
        Identity.load(tmp_path / "identity")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Identity.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="cannot be written"):
        Identity.generate().save(tmp_path / "file" / "identity")
