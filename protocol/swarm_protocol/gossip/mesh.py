"""GossipSub as we run it: what comes in is judged in order, one message at a time per neighbour, before it is passed on.

py-libp2p's `Pubsub` starts a task per message, crashes above a thousand of them, remembers a validator's refusal for
everybody else who sends the same, and reads frames that its own writer drops. Here the neighbour's stream waits while its
message is judged, so that a flood is slowed down where it comes from, and what is remembered is `validation.Gate`'s.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import trio
from libp2p.pubsub.gossipsub import PROTOCOL_ID_V11, GossipSub
from libp2p.pubsub.pb import rpc_pb2
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.score import ScoreParams, TopicScoreParams
from libp2p.pubsub.validators import signature_validator

from swarm_protocol.errors import EncodingError
from swarm_protocol.gossip.transport import end
from swarm_protocol.gossip.validation import MAX_MESSAGE_BYTES, WORST_SCORE, Outcome

log = logging.getLogger(__name__)

MAX_RPC_BYTES = 1 << 20
READ_BYTES = 64 << 10
MAX_MESSAGES_PER_RPC = 512
MAX_CONTROL_IDS = 2048
WRITE_S = 10.0
STREAMS_PER_NEIGHBOUR = 2  # a new one may come before the end of the old one is noticed
HEARTBEAT_S = 1
GOSSIP_WINDOW, GOSSIP_HISTORY = 6, 12  # heartbeats in which a record is offered again, and can be asked for
MAX_QUEUED = 128
DEGREE, DEGREE_LOW, DEGREE_HIGH = 5, 4, 8


class Judge(Protocol):
    """Who decides about neighbours, which go by their transport PeerID, and about what they send."""

    def heard(self, peer: str) -> bool:
        """Whether it may send a message now."""

    def judge(self, peer: str, data: bytes) -> Outcome:
        """What its message is; only what is accepted is passed on."""

    def repeated(self, peer: str) -> None:
        """It sent a message that came before."""

    def blame(self, peer: str, reason: str, *, certain: bool = False) -> None:
        """It did what only a broken or hostile neighbour does; if that is certain, it is dropped at once."""

    def score(self, peer: str) -> float:
        """0 at best."""


class _Router(GossipSub):  # type: ignore[misc]
    """py-libp2p's router without what it keeps for each message and never gives back."""

    def __init__(self, score: Callable[[Any], float]) -> None:
        super().__init__(
            protocols=[PROTOCOL_ID_V11],
            degree=DEGREE,
            degree_low=DEGREE_LOW,
            degree_high=DEGREE_HIGH,
            heartbeat_interval=HEARTBEAT_S,
            gossip_window=GOSSIP_WINDOW,
            gossip_history=GOSSIP_HISTORY,
            score_params=ScoreParams(
                p4_invalid_messages=TopicScoreParams(weight=10.0, cap=10.0, decay=0.9),
                p5_behavior_penalty_weight=1.0,
                p5_behavior_penalty_decay=0.9,
                p6_appl_slack_weight=1.0,
                publish_threshold=WORST_SCORE / 2,
                gossip_threshold=WORST_SCORE / 2,
                graylist_threshold=WORST_SCORE / 2,
                accept_px_threshold=0.0,
                app_specific_score_fn=score,
            ),
            adaptive_gossip_enabled=False,
            spam_protection_enabled=False,  # it drops without a word; rates are `validation.Standings`'
            eclipse_protection_enabled=False,
            max_pending_messages_per_peer=8,
        )

    def _check_equivocation(self, msg: Any) -> bool:
        """Equivocations of records are the gate's; this would keep a thousand whole messages."""
        return True

    async def publish(self, msg_forwarder: Any, pubsub_msg: Any) -> None:
        await super().publish(msg_forwarder, pubsub_msg)
        self.recent_message_deliveries.clear()


class Mesh(Pubsub):  # type: ignore[misc]
    """One topic, and who decides in it."""

    def __init__(self, host: Any, topic: str, judge: Judge) -> None:
        router = _Router(lambda peer: judge.score(str(peer)))
        super().__init__(host, router, strict_signing=True, allowed_topics={topic})
        self.topic = topic
        self.bytes_in = 0
        self.bytes_out = 0
        self._judge = judge
        self._reading: Counter[str] = Counter()

    def members(self) -> set[str]:
        """The neighbours that follow the run, by transport PeerID."""
        return {str(peer) for peer in self.peer_topics.get(self.topic, ()) if peer in self.peers}

    async def announce(self, data: bytes) -> None:
        """Send a message that was judged already."""
        await self.publish(self.topic, data)

    async def stream_handler(self, stream: Any) -> None:
        peer_id = stream.muxed_conn.peer_id
        name = str(peer_id)
        if self._reading[name] >= STREAMS_PER_NEIGHBOUR:
            await end(stream)
            return
        self._reading[name] += 1
        try:
            await self.continuously_read_stream(stream)
        except Exception as error:  # noqa: BLE001  an exception in a stream handler would end the host
            log.debug("the stream of %s ended: %r", name, error)
            await end(stream)
            self._handle_dead_peer(peer_id)
        finally:
            self._reading[name] -= 1
            if not self._reading[name]:
                del self._reading[name]

    async def continuously_read_stream(self, stream: Any) -> None:
        peer_id = stream.muxed_conn.peer_id
        name = str(peer_id)
        frames = _Frames(stream)
        while self.manager.is_running:
            raw = await frames.next(
                MAX_RPC_BYTES, lambda: self._judge.blame(name, "a frame that is too large", certain=True)
            )
            self.bytes_in += len(raw)
            rpc = rpc_pb2.RPC()
            try:
                rpc.ParseFromString(raw)
            except Exception:
                self._judge.blame(name, "a frame that is no message", certain=True)
                raise
            if len(rpc.publish) > MAX_MESSAGES_PER_RPC or _ids(rpc) > MAX_CONTROL_IDS:
                self._judge.blame(name, "too much in one frame", certain=True)
                raise EncodingError("too much in one frame")
            for message in rpc.publish:
                if self._judge.heard(name):
                    await self.push_msg(peer_id, message)
            if len(rpc.subscriptions) > 16:
                self._judge.blame(name, "too many subscriptions")
            else:
                for subscription in rpc.subscriptions:
                    self.handle_subscription(peer_id, subscription)
            if rpc.HasField("control"):
                await self.router.handle_rpc(rpc_pb2.RPC(control=rpc.control), peer_id)
            await trio.lowlevel.checkpoint()

    async def _handle_new_peer(self, peer_id: Any) -> None:
        await super()._handle_new_peer(peer_id)
        queue = self.peer_queues.get(peer_id)
        if queue is not None:
            queue._queue.max_size = MAX_QUEUED  # of the 32 that it has, a short stall makes it drop some

    async def push_msg(self, msg_forwarder: Any, msg: Any) -> None:
        """Judge a message, and pass it on if it is accepted."""
        name = str(msg_forwarder)
        if msg_forwarder == self.my_id:
            self._mark_msg_seen(msg)
            await self.router.publish(msg_forwarder, msg)
            return
        if list(msg.topicIDs) != [self.topic] or len(msg.data) > MAX_MESSAGE_BYTES:
            self._judge.blame(name, "a message of another topic, or too large")
            return
        if msg.from_id == self.my_id.to_bytes() or self._is_msg_seen(msg):
            self._judge.repeated(name)
            return
        if not _signed(msg):
            self._judge.blame(name, "a message without its sender's signature")
            return
        outcome = self._judge.judge(name, msg.data)
        if outcome is not Outcome.IGNORED:
            self._mark_msg_seen(msg)
        if outcome is Outcome.ACCEPTED:
            await self.router.publish(msg_forwarder, msg)

    async def write_msg(self, stream: Any, rpc_msg: Any) -> bool:
        """Write a frame; a neighbour that does not read for `WRITE_S` is taken for gone."""
        written = False
        with trio.move_on_after(WRITE_S) as scope:
            written = bool(await super().write_msg(stream, rpc_msg))
        if scope.cancelled_caught:
            log.info("%s does not read", stream.muxed_conn.peer_id)
            self._handle_dead_peer(stream.muxed_conn.peer_id)
        self.bytes_out += rpc_msg.ByteSize() if written else 0
        return written


def _signed(message: Any) -> bool:
    try:
        return bool(signature_validator(message))
    except Exception:  # noqa: BLE001  it raises for keys that are none
        return False


def _ids(rpc: Any) -> int:
    control = rpc.control
    return (
        sum(1 + len(one.messageIDs) for one in (*control.ihave, *control.iwant))
        + len(control.graft)
        + sum(1 + len(one.peers) for one in control.prune)
        + sum(1 + len(one.messageIDs) for one in control.idontwant)
    )


class _Frames:
    """Frames with a varint length, read in large pieces: py-libp2p answers every read with a frame of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._buffer = bytearray()

    async def next(self, max_bytes: int, too_large: Callable[[], None]) -> bytes:
        """Raises `EncodingError` if the stream ends before, or the frame is longer than allowed."""
        size = at = 0
        while True:
            await self._fill(at + 1)
            byte = self._buffer[at]
            size |= (byte & 0x7F) << 7 * at
            at += 1
            if byte < 0x80:
                break
            if at == 5:
                too_large()
                raise EncodingError("a length beyond all bounds")
        if size > max_bytes:
            too_large()
            raise EncodingError(f"a frame of {size} bytes where at most {max_bytes} are allowed")
        await self._fill(at + size)
        frame = bytes(self._buffer[at : at + size])
        del self._buffer[: at + size]
        return frame

    async def _fill(self, size: int) -> None:
        while len(self._buffer) < size:
            piece = await self._stream.read(READ_BYTES)
            if not piece:
                raise EncodingError("the stream ended within a frame")
            self._buffer += piece
