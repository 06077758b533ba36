"""One Ed25519 key is a node's identity; its PeerID is the same on every plane.

The key file is the one that hivemind's Go daemon reads, so that signatures, the peer network and the DHT share one name:
`08 01 12 40`, the 32-byte seed, the 32-byte public key. It is created with mode 0600 and never travels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from swarm_protocol.errors import ConfigurationError, InvalidDataError, SignatureError
from swarm_protocol.files import sync_directory

_KEY_FILE_PREFIX = bytes.fromhex("08011240")
_PEER_ID_PREFIX = bytes.fromhex("002408011220")
_ALPHABET = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def peer_id(public_key: bytes) -> str:
    """The libp2p PeerID of a raw 32-byte Ed25519 public key: base58btc of its identity multihash (`12D3Koo...`)."""
    if len(public_key) != 32:
        raise InvalidDataError(f"an Ed25519 public key has 32 bytes, not {len(public_key)}")
    number = int.from_bytes(_PEER_ID_PREFIX + public_key, "big")
    digits = ""
    while number:
        number, digit = divmod(number, 58)
        digits = _ALPHABET[digit] + digits
    return "1" + digits  # the multihash starts with one zero byte, which base58btc writes as "1"


def public_key_of(peer: str) -> bytes:
    """The raw public key inside a PeerID.

    Raises:
        InvalidDataError: not the PeerID of an Ed25519 key.
    """
    number = 0
    for letter in peer[:64]:
        digit = _ALPHABET.find(letter)
        if digit < 0:
            raise InvalidDataError(f"{peer[:64]!r} is not a PeerID")
        number = number * 58 + digit
    raw = number.to_bytes(48, "big")
    key = raw[-32:]
    if len(peer) > 64 or peer_id(key) != peer:
        raise InvalidDataError(f"{peer[:64]!r} is not the PeerID of an Ed25519 key")
    return key


def verify(public_key: bytes, signature: bytes, message: bytes) -> None:
    """Raises `SignatureError` unless `signature` is the key's over `message`."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("the signature does not fit") from error


@dataclass(frozen=True)
class Identity:
    """A private key and what follows from it."""

    key: Ed25519PrivateKey

    @classmethod
    def generate(cls) -> Identity:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """From the 32-byte private seed."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read a key file.

        Raises:
            ConfigurationError: missing, readable by others, or not a key file.
        """
        try:
            mode, raw = path.stat().st_mode, path.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"the identity file {path} cannot be read: {error.strerror}") from error
        if mode & 0o077:
            raise ConfigurationError(f"the identity file {path} is open to other users; run: chmod 600 {path}")
        if len(raw) != 68 or not raw.startswith(_KEY_FILE_PREFIX):
            raise ConfigurationError(f"{path} is not an identity file; restore it from a backup, or move it away")
        identity = cls.from_seed(raw[4:36])
        if identity.public_key != raw[36:]:
            raise ConfigurationError(f"the identity file {path} is damaged; restore it from a backup, or move it away")
        return identity

    @classmethod
    def load_or_create(cls, path: Path) -> Identity:
        """The identity in `path`, made and stored there on first use."""
        if path.exists():
            return cls.load(path)
        identity = cls.generate()
        identity.save(path)
        return identity

    def save(self, path: Path) -> None:
        """Write the key file durably, with mode 0600; an existing file is never overwritten.

        Raises:
            ConfigurationError: there is a file already, or the folder may not be written.
        """
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.write(_KEY_FILE_PREFIX + self.seed + self.public_key)
                    file.flush()
                    os.fsync(file.fileno())
                os.link(temporary, path)
            finally:
                temporary.unlink()
            sync_directory(path.parent)
        except OSError as error:
            raise ConfigurationError(f"the identity file {path} cannot be written: {error.strerror}") from error

    @cached_property
    def seed(self) -> bytes:
        return self.key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())

    @cached_property
    def public_key(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    @cached_property
    def peer_id(self) -> str:
        return peer_id(self.public_key)

    def sign(self, message: bytes) -> bytes:
        return self.key.sign(message)
