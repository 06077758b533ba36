"""A TLS 1.3 connection between two peers, each of which has shown the other its identity key. Blocking, with deadlines.

The listener's certificate is its own and fresh; in it nobody trusts anything. Inside the encrypted connection the listener
signs the certificate with its identity, so whoever holds the private key to it is that peer and nobody is in between. The
dialler signs the same certificate and a nonce of the listener, so its signature is worth nothing at any other listener.

    listener -> dialler:  nonce (32), public key (32), signature of H("listener", run, certificate)
    dialler -> listener:  public key (32), signature of H("dialler", run, certificate, nonce)
"""

from __future__ import annotations

import contextlib
import datetime
import secrets
import select
import socket
import ssl
import tempfile
import time
from pathlib import Path

from blake3 import blake3
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from swarm_protocol.errors import InvalidDataError
from swarm_protocol.identity import Identity, verify

WRITE_BYTES = 1 << 18


class Certificate:
    """A key pair and a self-signed certificate that live as long as this process."""

    def __init__(self) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "swarm-node")])
        ever = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(ever)
            .not_valid_after(ever.replace(year=2120))
            .sign(key, hashes.SHA256())
        )
        self.der = certificate.public_bytes(Encoding.DER)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_3
        self.context.num_tickets = 0  # or something would be there to read when nobody has said anything
        pem = certificate.public_bytes(Encoding.PEM)
        pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        with tempfile.TemporaryDirectory() as folder:  # the ssl module reads keys from files only
            path = Path(folder) / "key"
            path.touch(mode=0o600)
            path.write_bytes(pem)
            self.context.load_cert_chain(path)


class Channel:
    """An authenticated connection. One thread at a time uses it; `abort` may come from any."""

    def __init__(self, connection: ssl.SSLSocket, peer: bytes) -> None:
        self.peer = peer
        self.idle_since = time.monotonic()
        self._socket = connection
        self._poll = select.poll()

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, *buffers: bytes | bytearray | memoryview, deadline: float, until_answered: bool = False) -> bool:
        """Send everything; with `until_answered` stop where the other side says something, and return False.

        Raises:
            OSError: the connection broke.
            TimeoutError: the deadline (of the monotonic clock) has passed.
        """
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            while view:
                if until_answered and self._ready(select.POLLIN, 0.0):
                    return False
                try:
                    view = view[self._socket.send(view[:WRITE_BYTES]) :]
                except ssl.SSLWantWriteError:
                    self._wait(select.POLLOUT | (select.POLLIN if until_answered else 0), deadline)
                except ssl.SSLWantReadError:
                    self._wait(select.POLLIN, deadline)
        return True

    def receive_into(self, view: memoryview, deadline: float) -> None:
        """Fill `view`.

        Raises:
            OSError, EOFError: the connection broke, or was closed before.
            TimeoutError
        """
        while view:
            try:
                count = self._socket.recv_into(view)
            except ssl.SSLWantReadError:
                self._wait(select.POLLIN, deadline)
                continue
            except ssl.SSLWantWriteError:
                self._wait(select.POLLOUT, deadline)
                continue
            if count == 0:
                raise EOFError("the connection was closed")
            view = view[count:]

    def receive(self, size_bytes: int, deadline: float) -> bytearray:
        """The next `size_bytes`; raises like `receive_into`."""
        content = bytearray(size_bytes)
        self.receive_into(memoryview(content), deadline)
        return content

    def drain(self, deadline: float) -> None:
        """Discard what still comes, until the other side closes: to close on it would lose what we said last."""
        waste = memoryview(bytearray(WRITE_BYTES))
        with contextlib.suppress(OSError, EOFError, TimeoutError):
            while time.monotonic() < deadline:
                self.receive_into(waste[:16384], deadline)

    def stale(self) -> bool:
        """Whether an idle connection is of no use any more: closed by the other side, or something unasked came."""
        return self._ready(select.POLLIN, 0.0)

    def abort(self) -> None:
        """Break the connection, under whoever uses it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _ready(self, events: int, timeout_s: float) -> bool:
        if events & select.POLLIN and self._socket.pending():
            return True
        self._poll.register(self._socket, events)
        return bool(self._poll.poll(timeout_s * 1000))

    def _wait(self, events: int, deadline: float) -> None:
        left_s = deadline - time.monotonic()
        if left_s <= 0 or not self._ready(events, left_s):
            raise TimeoutError("timed out")


def dial(address: tuple[str, int], identity: Identity, run: bytes, peer: bytes, deadline: float) -> Channel:
    """Connect to the peer with this key at (IP address, port).

    Raises:
        OSError, EOFError, TimeoutError: nobody there, or nobody who speaks this.
        InvalidDataError: somebody else is there.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the identity key vouches for the certificate, see above
    plain = socket.create_connection(address, timeout=max(0.01, deadline - time.monotonic()))
    channel = Channel(_wrapped(plain, context, deadline, server_side=False), peer)
    try:
        certificate = channel._socket.getpeercert(binary_form=True) or b""
        said = bytes(channel.receive(128, deadline))
        nonce, key, signature = said[:32], said[32:64], said[64:]
        if key != peer:
            raise InvalidDataError("another peer than the one wanted listens there")
        verify(key, signature, _claim("listener", run, certificate))
        proof = identity.sign(_claim("dialler", run, certificate, nonce))
        channel.send(identity.public_key + proof, deadline=deadline)
    except BaseException:
        channel.close()
        raise
    return channel


def accept(plain: socket.socket, certificate: Certificate, identity: Identity, run: bytes, deadline: float) -> Channel:
    """Make a connection that came in a channel.

    Raises:
        OSError, EOFError, TimeoutError, InvalidDataError: whoever it was does not speak this, or is not who it says.
    """
    channel = Channel(_wrapped(plain, certificate.context, deadline, server_side=True), b"")
    try:
        nonce = secrets.token_bytes(32)
        proof = identity.sign(_claim("listener", run, certificate.der))
        channel.send(nonce + identity.public_key + proof, deadline=deadline)
        said = bytes(channel.receive(96, deadline))
        verify(said[:32], said[32:], _claim("dialler", run, certificate.der, nonce))
    except BaseException:
        channel.close()
        raise
    channel.peer = said[:32]
    return channel


def _wrapped(plain: socket.socket, context: ssl.SSLContext, deadline: float, *, server_side: bool) -> ssl.SSLSocket:
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        plain.settimeout(max(0.01, deadline - time.monotonic()))
        connection = context.wrap_socket(plain, server_side=server_side, suppress_ragged_eofs=True)
    except BaseException:
        plain.close()
        raise
    connection.setblocking(False)
    return connection


def _claim(side: str, run: bytes, *pieces: bytes) -> bytes:
    hasher = blake3(run, derive_key_context=f"swarm-node 2026 direct connection {side}")
    for piece in pieces:
        hasher.update(blake3(piece).digest())
    return hasher.digest()
