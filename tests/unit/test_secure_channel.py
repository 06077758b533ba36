"""A direct connection is between the two peers that it says, and nobody in between."""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from swarm_protocol import secure_channel
from swarm_protocol.errors import InvalidDataError, SignatureError
from swarm_protocol.identity import Identity
from swarm_protocol.secure_channel import Certificate, Channel, accept, dial

RUN = bytes([1]) * 32
ALICE, BOB, EVE = (Identity.from_seed(bytes([number]) * 32) for number in (1, 2, 3))
CERTIFICATE = Certificate()
MEBIBYTE = 1 << 20


def soon() -> float:
    return time.monotonic() + 5.0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


@pytest.fixture
def in_background() -> Iterator[Callable[..., Future[Channel]]]:
    with ThreadPoolExecutor(2) as pool:
        yield pool.submit


def listen(at: socket.socket, identity: Identity = BOB, run: bytes = RUN) -> Channel:
    plain, _ = at.accept()
    return accept(plain, CERTIFICATE, identity, run, soon())


Background = Callable[..., "Future[Channel]"]


def test_both_sides_know_each_other(listener: socket.socket, in_background: Background) -> None:
    accepted = in_background(listen, listener)
    here = dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    there = accepted.result(5)
    assert (here.peer, there.peer) == (BOB.public_key, ALICE.public_key)
    sent = secrets.token_bytes(3 * MEBIBYTE)
    received = in_background(there.receive, len(sent), soon())
    assert here.send(sent[:5], memoryview(sent)[5:], deadline=soon())
    assert received.result(5) == sent
    there.close()
    with pytest.raises(EOFError):
        here.receive(1, soon())
    here.close()


def test_somebody_else_at_the_address_is_refused(listener: socket.socket, in_background: Background) -> None:
    accepted = in_background(listen, listener, EVE)
    with pytest.raises(InvalidDataError, match="another peer"):
        dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    with pytest.raises((EOFError, OSError)):
        accepted.result(5)


def test_a_peer_of_another_run_is_refused(listener: socket.socket, in_background: Background) -> None:
    accepted = in_background(listen, listener, BOB, bytes(32))
    with pytest.raises(SignatureError):
        dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    with pytest.raises((EOFError, OSError)):
        accepted.result(5)


def test_whoever_passes_on_what_the_listener_said_is_found_out(
    listener: socket.socket, in_background: Background
) -> None:
    """Eve has a certificate of her own, and Bob's signature over his."""

    def eve() -> bytes:
        plain, _ = listener.accept()
        channel = Channel(secure_channel._wrapped(plain, Certificate().context, soon(), server_side=True), b"")
        proof = BOB.sign(secure_channel._claim("listener", RUN, CERTIFICATE.der))
        channel.send(bytes(32) + BOB.public_key + proof, deadline=soon())
        try:
            return channel.receive(96, soon())
        finally:
            channel.close()

    heard = in_background(eve)
    with pytest.raises(SignatureError):
        dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    with pytest.raises((EOFError, OSError)):
        heard.result(5)


def test_a_dialler_cannot_use_what_another_one_signed(listener: socket.socket, in_background: Background) -> None:
    """Eve has a signature of Alice for this very listener, over an earlier nonce."""
    accepted = in_background(listen, listener)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    plain = socket.create_connection(listener.getsockname(), 5)
    channel = Channel(secure_channel._wrapped(plain, context, soon(), server_side=False), b"")
    channel.receive(128, soon())
    old = ALICE.sign(secure_channel._claim("dialler", RUN, CERTIFICATE.der, bytes(32)))
    channel.send(ALICE.public_key + old, deadline=soon())
    with pytest.raises(SignatureError):
        accepted.result(5)
    channel.close()


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(10_000)])
def test_noise_at_the_door_ends_that_connection_only(
    listener: socket.socket, in_background: Background, noise: bytes
) -> None:
    accepted = in_background(listen, listener)
    with socket.create_connection(listener.getsockname(), 5) as plain:
        plain.sendall(noise)
        with contextlib.suppress(OSError):  # the listener may have had enough already
            plain.shutdown(socket.SHUT_WR)
        with pytest.raises((OSError, EOFError, InvalidDataError)):
            accepted.result(6)


def test_a_silent_listener_is_given_up_at_the_deadline(listener: socket.socket) -> None:
    started = time.monotonic()
    with pytest.raises(TimeoutError):
        dial(listener.getsockname(), ALICE, RUN, BOB.public_key, started + 0.2)
    assert time.monotonic() - started < 2


def test_a_reader_that_stops_holds_the_sender_back_until_the_deadline(
    listener: socket.socket, in_background: Background
) -> None:
    accepted = in_background(listen, listener)
    here = dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    there = accepted.result(5)
    with pytest.raises(TimeoutError):
        here.send(bytes(64 * MEBIBYTE), deadline=time.monotonic() + 0.3)
    here.close()
    there.close()


def test_an_answer_stops_a_sender_who_waits_for_it(listener: socket.socket, in_background: Background) -> None:
    accepted = in_background(listen, listener)
    here = dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    there = accepted.result(5)
    there.send(b"no", deadline=soon())
    assert not here.send(bytes(64 * MEBIBYTE), deadline=soon(), until_answered=True)
    assert here.receive(2, soon()) == b"no"
    here.close()
    there.close()


def test_a_connection_can_be_broken_under_its_reader(listener: socket.socket, in_background: Background) -> None:
    accepted = in_background(listen, listener)
    here = dial(listener.getsockname(), ALICE, RUN, BOB.public_key, soon())
    there = accepted.result(5)
    threading.Timer(0.1, here.abort).start()
    with pytest.raises((EOFError, OSError)):
        here.receive(1, soon())
    here.close()
    there.close()
