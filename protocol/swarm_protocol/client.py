"""The coordinator's HTTP API, as nodes, auditors and the checkpoint worker use it.

Every answer is checked before it is believed: the spec against the run id, records against their signatures, chunks against
their hashes. Every call has a deadline; `UnreachableError` means that trying again later may help, `RefusedError` that the
coordinator understood and said no.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self

import httpx

from swarm_protocol import encoding
from swarm_protocol.calls import Traffic
from swarm_protocol.chunks import CHUNK_BYTES, StateManifest, content_hash
from swarm_protocol.errors import (
    ConfigurationError,
    EncodingError,
    HashMismatchError,
    InvalidDataError,
    RefusedError,
    UnreachableError,
)
from swarm_protocol.http import TIMEOUT_S, json_of, request
from swarm_protocol.parts import part_count
from swarm_protocol.receipts import Receipts
from swarm_protocol.records import (
    MAX_RECORD_BYTES,
    Appointment,
    BeaconReveal,
    CheckpointManifest,
    Commitment,
    CommitmentSet,
    Envelope,
    LogHead,
    PartRecord,
    Record,
    Role,
    RoundManifest,
    RoundPlan,
    Sketches,
    SketchSet,
    decode_list,
)
from swarm_protocol.sketching import require_for
from swarm_protocol.spec import MAX_SPEC_BYTES, RunSpec

log = logging.getLogger(__name__)

CBOR = "application/cbor"
OCTETS = "application/octet-stream"
MAX_LIST_BYTES = 64 << 20
MAX_JSON_BYTES = 16 << 20
MAX_CHUNK_BYTES = 1 << 28
MAX_ENTRIES_BYTES = 16 << 20
MAX_PAGES = 10_000


class Commitments:
    """A round's signed commitment set and the commitments that it names, by slot."""

    def __init__(self, closing: CommitmentSet, by_slot: dict[int, Commitment]) -> None:
        self.closing = closing
        self.by_slot = by_slot


class CountedSketches:
    """A round's signed sketch set and the Sketches that count by it, by slot."""

    def __init__(self, closing: SketchSet, by_slot: dict[int, Sketches]) -> None:
        self.closing = closing
        self.by_slot = by_slot


class SealedRound:
    """A round's manifest and the part records that it names, by their hash, with their reducers' keys.

    `checkpoint` is what the coordinator signed of the checkpoint that the next round starts from.
    """

    def __init__(
        self,
        manifest: RoundManifest,
        part_records: dict[bytes, tuple[PartRecord, bytes]],
        checkpoint: CheckpointManifest,
    ) -> None:
        self.manifest = manifest
        self.part_records = part_records
        self.checkpoint = checkpoint


class CoordinatorClient:
    """One run at one coordinator. Make it with `connect`; close it, or use it as a context.

    `traffic` counts the bodies of requests and answers, without HTTP's own.
    """

    def __init__(self, http: httpx.AsyncClient, url: str, spec: RunSpec, token: str | None) -> None:
        self.url = url
        self.spec = spec
        self._http = http
        self._token = token
        self._base = f"{url}/v1/runs/{spec.run_id.hex()}"
        self._owner = bytes.fromhex(spec.coordinator)
        self._receipts = Receipts(spec)
        self.traffic = Traffic()
        self._newest: dict[str, tuple[int, Envelope]] = {}

    @classmethod
    async def connect(cls, url: str, *, token: str | None = None, timeout_s: float = TIMEOUT_S) -> CoordinatorClient:
        """Find the run at `url`: the one that it names (`.../v1/runs/RUN_ID`), or the only one there.

        Raises:
            UnreachableError, RefusedError, ConfigurationError
        """
        url = url.rstrip("/")
        if "://" not in url:
            url = f"http://{url}"
        root, _, wanted = url.partition("/v1/runs/")
        # Answers are bounded as they come, so nobody may compress them on the way.
        http = httpx.AsyncClient(limits=httpx.Limits(max_connections=16), headers={"accept-encoding": "identity"})
        try:
            if not wanted:
                runs = json_of(await request(http, "GET", f"{root}/v1/runs", MAX_JSON_BYTES, timeout_s=timeout_s))
                found = (
                    [str(run.get("run_id")) for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
                )
                if len(found) != 1:
                    names = ", ".join(found) or "none"
                    raise ConfigurationError(f"say which run: {root}/v1/runs/RUN_ID, with one of: {names}")
                wanted = found[0]
            url = f"{root}/v1/runs/{wanted}/spec"
            raw = (await request(http, "GET", url, MAX_SPEC_BYTES, timeout_s=timeout_s)).content
            spec = RunSpec.decode(raw)
            if spec.run_id.hex() != wanted:
                raise HashMismatchError("the coordinator serves a spec that does not hash to the run id")
        except BaseException:
            await http.aclose()
            raise
        return cls(http, root, spec, token)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    # Records

    async def post(self, envelope: Envelope) -> dict[str, Any]:
        """Hand in a signed record; the same one twice is harmless. Returns the coordinator's answer, its receipt checked."""
        headers = {"content-type": CBOR}
        if self._token:
            headers["authorization"] = f"Bearer {self._token}"
        try:
            response = await self._call("POST", "/records", MAX_JSON_BYTES, content=envelope.encode(), headers=headers)
        except RefusedError as error:
            if error.code == "recovering":
                raise UnreachableError(str(error)) from error
            raise
        receipt = json_of(response)
        if not isinstance(receipt, dict):
            raise InvalidDataError("the coordinator's receipt is not an object")
        if receipt.get("receipt") is not None:
            self._receipts.note(envelope, receipt["receipt"])
        return receipt

    async def hand_in(self) -> None:
        """Show a coordinator that was restored from a backup the newest records of its own that we have seen."""
        for _, envelope in list(self._newest.values()):
            try:
                await self.post(envelope)
            except RefusedError as error:
                log.warning("the coordinator does not take back what it signed: %s", error)

    def _keep(self, envelope: Envelope, record: Record) -> None:
        """Note what the coordinator signed, the newest of each kind, for `hand_in`."""
        number, _ = self._newest.get(record.kind, (-1, None))
        if record.round >= number:
            self._newest[record.kind] = (record.round, envelope)

    async def check_receipts(self, plan: RoundPlan) -> None:
        """Say loudly if the log that a plan is made from lacks a commitment of ours that was acknowledged."""
        try:
            await self._receipts.check(plan, self._inclusion_proof)
        except UnreachableError as error:
            log.info("receipts cannot be checked now: %s", error)

    async def record(self, record_hash: bytes) -> Envelope:
        """A record by its hash; whoever needs it checks who signed it."""
        envelope = Envelope.decode((await self._call("GET", f"/records/{record_hash.hex()}", MAX_RECORD_BYTES)).content)
        if envelope.open().hash != record_hash:
            raise HashMismatchError("the coordinator serves another record than the one asked for")
        return envelope

    async def plan(self, round_number: int, *, wait_s: float = 0.0) -> RoundPlan | None:
        """The plan of a round, or None if it is not there after `wait_s`."""
        raw = await self._poll(f"/rounds/{round_number}/plan", wait_s, MAX_RECORD_BYTES)
        if raw is None:
            return None
        envelope = Envelope.decode(raw)
        found = envelope.open_as(RoundPlan, run=self.spec.run_id, round=round_number, key=self._owner)
        self._keep(envelope, found)
        return found

    async def commitments(self, plan: RoundPlan, *, wait_s: float = 0.0) -> Commitments | None:
        """The commitments that count in a round, checked against the plan and the signed set."""
        raw = await self._poll(f"/rounds/{plan.round}/commitments", wait_s, MAX_LIST_BYTES)
        if raw is None:
            return None
        first, *rest = _not_empty(raw)
        closing = first.open_as(CommitmentSet, run=self.spec.run_id, round=plan.round, key=self._owner)
        by_slot: dict[int, Commitment] = {}
        if closing.plan != plan.hash or len(closing.commitments) != len(rest):
            raise InvalidDataError("the commitment set does not belong to the plan")
        for entry, envelope in zip(closing.commitments, rest, strict=True):
            if entry.slot >= len(plan.roster):
                raise InvalidDataError(f"slot {entry.slot} is not in the roster")
            holder = plan.roster[entry.slot].peer
            commitment = envelope.open_as(Commitment, run=self.spec.run_id, round=plan.round, key=holder)
            if commitment.hash != entry.hash or commitment.slot != entry.slot:
                raise InvalidDataError("a commitment that the set does not name")
            if commitment.plan != plan.hash or entry.slot in by_slot:
                raise InvalidDataError(f"the commitment of slot {entry.slot} is for another plan, or named twice")
            by_slot[entry.slot] = commitment
        return Commitments(closing, by_slot)

    async def part_records(self, round_number: int, *, after: int = 0, wait_s: float = 0.0) -> list[Envelope] | None:
        """The part records of a round after the first `after`, as they came in; None if none comes within `wait_s`."""
        raw = await self._poll(f"/rounds/{round_number}/part-records", wait_s, MAX_LIST_BYTES, after=after)
        return None if raw is None else decode_list(raw, max_bytes=MAX_LIST_BYTES)

    async def sketch_records(self, round_number: int, *, after: int = 0, wait_s: float = 0.0) -> list[Envelope] | None:
        """The Sketches and SketchObjections of a round after the first `after`, as they came in; None if none comes."""
        raw = await self._poll(f"/rounds/{round_number}/sketches", wait_s, MAX_LIST_BYTES, after=after)
        return None if raw is None else decode_list(raw, max_bytes=MAX_LIST_BYTES)

    async def sketch_set(
        self, plan: RoundPlan, commitments: Commitments, *, wait_s: float = 0.0
    ) -> CountedSketches | None:
        """Which sketches count in a round, by its appointed checkpoint worker; each signed by its slot's holder."""
        raw = await self._poll(f"/rounds/{plan.round}/sketch-set", wait_s, MAX_LIST_BYTES)
        if raw is None:
            return None
        office, *rest = _not_empty(raw)
        appointment = office.open_as(Appointment, run=self.spec.run_id, key=self._owner)
        if appointment.role is not Role.CHECKPOINT_WORKER or not rest:
            raise InvalidDataError("a sketch set comes after the appointment of the checkpoint worker")
        closing = rest[0].open_as(SketchSet, run=self.spec.run_id, round=plan.round, key=appointment.key)
        named, envelopes = closing.counted, rest[1:]
        if closing.commitment_set != commitments.closing.hash or len(named) != len(envelopes):
            raise InvalidDataError("the sketch set does not belong to the commitment set")
        by_slot: dict[int, Sketches] = {}
        for entry, envelope in zip(named, envelopes, strict=True):
            if entry.slot not in commitments.by_slot or entry.slot in by_slot:
                raise InvalidDataError(f"sketches of slot {entry.slot}, which has not committed, or named twice")
            holder = plan.roster[entry.slot].peer
            record = envelope.open_as(Sketches, run=self.spec.run_id, round=plan.round, key=holder)
            require_for(record, commitments.closing.hash, commitments.by_slot[entry.slot])
            if record.hash != entry.hash:
                raise InvalidDataError("sketches that the set does not name")
            by_slot[entry.slot] = record
        return CountedSketches(closing, by_slot)

    async def sealing(self, round_number: int, *, wait_s: float = 0.0) -> list[bytes | None] | None:
        """Which part records a round will be sealed with, once its exchange is closed."""
        raw = await self._poll(f"/rounds/{round_number}/sealing", wait_s, MAX_LIST_BYTES)
        if raw is None:
            return None
        value = encoding.decode(raw, max_bytes=MAX_LIST_BYTES)
        if not isinstance(value, list):
            raise EncodingError("a list of part records was expected")
        parts: list[bytes | None] = []
        for item in value:
            if item is not None and not isinstance(item, bytes):
                raise EncodingError("part records are named by their hash")
            parts.append(item)
        return parts

    async def manifest(self, plan: RoundPlan, *, wait_s: float = 0.0) -> SealedRound | None:
        """The manifest of a round with the part records that it names, each signed by a reducer of the roster."""
        raw = await self._poll(f"/rounds/{plan.round}/manifest", wait_s, MAX_LIST_BYTES)
        if raw is None:
            return None
        first, *more = _not_empty(raw)
        manifest = first.open_as(RoundManifest, run=self.spec.run_id, round=plan.round, key=self._owner)
        self._keep(first, manifest)
        if manifest.plan != plan.hash or manifest.base != plan.base:
            raise InvalidDataError("the manifest does not belong to the plan")
        if len(manifest.parts) != part_count(self.spec):
            raise InvalidDataError(
                f"a manifest of {len(manifest.parts)} parts where the run has {part_count(self.spec)}"
            )
        if not more:
            raise InvalidDataError("a manifest without that of the checkpoint that it leads to")
        checkpoint = more[0].open_as(CheckpointManifest, run=self.spec.run_id, round=plan.round + 1, key=self._owner)
        reducers = {seat.peer for seat in plan.roster if seat.reducer}
        found: dict[bytes, tuple[PartRecord, bytes]] = {}
        for envelope in more[1:]:
            record = envelope.open_as(PartRecord, run=self.spec.run_id, round=plan.round)
            if envelope.key not in reducers:
                raise InvalidDataError("a part record whose signer is no reducer of the round")
            found[record.hash] = (record, envelope.key)
        for part, name in enumerate(manifest.parts):
            if name is not None and (name not in found or found[name][0].part != part):
                raise InvalidDataError(f"the manifest names a record for part {part} that is not there")
        return SealedRound(manifest, found, checkpoint)

    async def beacon(self, round_number: int, *, wait_s: float = 0.0) -> BeaconReveal | None:
        """The beacon value of a round, once it is revealed."""
        raw = await self._poll(f"/rounds/{round_number}/beacon", wait_s, MAX_RECORD_BYTES)
        if raw is None:
            return None
        envelope = Envelope.decode(raw)
        found = envelope.open_as(BeaconReveal, run=self.spec.run_id, round=round_number, key=self._owner)
        self._keep(envelope, found)
        return found

    # Everything else

    async def status(self) -> dict[str, Any]:
        """The run as JSON (see the API's `RunStatus`)."""
        status = json_of(await self._call("GET", "", MAX_JSON_BYTES))
        if not isinstance(status, dict):
            raise InvalidDataError("the coordinator's status is not an object")
        return status

    async def peers(self) -> tuple[list[str], bool]:
        """The peer plane's way in, and whether the coordinator wants to be shown what it signed last (`hand_in`)."""
        value = json_of(await self._call("GET", "/peers", MAX_JSON_BYTES))
        try:
            return [str(address) for address in value["peers"]], bool(value["recovering"])
        except (KeyError, TypeError) as error:
            raise InvalidDataError("the coordinator's peers are not a list of addresses") from error

    async def node(self, key: bytes) -> dict[str, Any]:
        """An identity as JSON (see the API's `NodeStatus`)."""
        node = json_of(await self._call("GET", f"/nodes/{key.hex()}", MAX_JSON_BYTES))
        if not isinstance(node, dict):
            raise InvalidDataError("the coordinator's account of a node is not an object")
        return node

    async def nodes(self) -> list[dict[str, Any]]:
        """All identities that ever registered (see the API's `NodeStatus`), page by page."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        for _ in range(MAX_PAGES):
            params = {} if after is None else {"after": after}
            page = json_of(await self._call("GET", "/nodes", MAX_JSON_BYTES, params=params))
            try:
                found += [dict(node) for node in page["nodes"]]
                after = page["next"]
            except (KeyError, TypeError, ValueError) as error:
                raise InvalidDataError("the coordinator's list of nodes is no page of nodes") from error
            if after is None:
                return found
        raise InvalidDataError(f"the coordinator's list of nodes does not end after {MAX_PAGES} pages")

    async def round_detail(self, round_number: int) -> dict[str, Any]:
        """A round as JSON (see the API's `RoundDetail`)."""
        detail = json_of(await self._call("GET", f"/rounds/{round_number}", MAX_JSON_BYTES))
        if not isinstance(detail, dict):
            raise InvalidDataError("the coordinator's account of a round is not an object")
        return detail

    async def place(self, key: bytes) -> dict[str, Any]:
        """Where an identity stands on its way to a slot (see the API's `Place`)."""
        place = json_of(await self._call("GET", f"/nodes/{key.hex()}/place", MAX_JSON_BYTES))
        if not isinstance(place, dict):
            raise InvalidDataError("the coordinator's answer about our place is not an object")
        return place

    async def open_audits(self, auditor: bytes, *, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """Audits that this auditor has not given a verdict on."""
        response = await self._call(
            "GET",
            "/audits",
            MAX_JSON_BYTES,
            timeout_s=wait_s + TIMEOUT_S,
            params={"auditor": auditor.hex(), "wait_s": wait_s},
        )
        audits = json_of(response)
        return audits if isinstance(audits, list) else []

    async def log_head(self) -> tuple[int, bytes]:
        """Size and root of the transparency log."""
        value = await self.json("/log/head")
        try:
            size, root = int(value["size"]), bytes.fromhex(value["root"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataError("the coordinator's log head is not a size and a root") from error
        return size, root

    async def signed_log_head(self, *, after: int | None = None, wait_s: float = 0.0) -> tuple[LogHead, Envelope]:
        """The log's head as the coordinator signs it; waits so long for a log of more than `after` leaves."""
        params = {} if after is None else {"after": after, "wait_s": wait_s}
        response = await self._call("GET", "/log/head", MAX_JSON_BYTES, timeout_s=wait_s + TIMEOUT_S, params=params)
        try:
            envelope = Envelope.decode(bytes.fromhex(json_of(response)["signed"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataError("the coordinator's log head is not signed") from error
        return envelope.open_as(LogHead, run=self.spec.run_id, key=self._owner), envelope

    async def json(self, path: str, **params: str | int) -> dict[str, Any]:
        """Any of the run's routes that answers with a JSON object."""
        value = json_of(await self._call("GET", path, MAX_JSON_BYTES, params=params))
        if not isinstance(value, dict):
            raise InvalidDataError(f"the coordinator's answer to {path} is not an object")
        return value

    async def log(self, first: int, size: int) -> AsyncIterator[Envelope]:
        """The log's records in leaf order, from leaf `first` to the end of a log of `size`, asked for as they are taken.

        Whoever needs them checks their signatures, and the root (see `history`).
        """
        while first < size:
            params = {"start": first}
            raw = (await self._call("GET", "/log/entries", MAX_ENTRIES_BYTES, params=params)).content
            envelopes = decode_list(raw, max_bytes=MAX_ENTRIES_BYTES)
            if not envelopes:
                raise InvalidDataError(f"the coordinator has no leaf {first} of a log of {size}")
            for envelope in envelopes[: size - first]:
                yield envelope
            first += len(envelopes)

    async def latest_checkpoint(self) -> tuple[int, bytes]:
        """The newest sealed checkpoint: the round that starts from it, and its root."""
        value = json_of(await self._call("GET", "/checkpoints/latest", MAX_JSON_BYTES))
        try:
            return int(value["round"]), bytes.fromhex(value["root"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataError("the coordinator's latest checkpoint is not a round and a root") from error

    async def state_manifest(self, root: bytes) -> StateManifest:
        """The chunk hashes of a checkpoint, or of the trunk, checked against its root."""
        response = await self._call("GET", f"/checkpoints/{root.hex()}", MAX_LIST_BYTES)
        largest = max(8 * self.spec.num_trainable, 4 * self.spec.model.num_parameters)  # a checkpoint, or the trunk
        manifest = StateManifest.decode(response.content, max_size_bytes=largest)
        if manifest.root != root:
            raise HashMismatchError("the coordinator serves the manifest of another checkpoint")
        return manifest

    async def chunk(self, digest: bytes, *, max_bytes: int = CHUNK_BYTES, timeout_s: float = 120.0) -> bytes:
        """A content-addressed piece of a checkpoint, of the data, or of a round's result."""
        data = (await self._call("GET", f"/chunks/{digest.hex()}", max_bytes, timeout_s=timeout_s)).content
        if content_hash(data) != digest:
            raise HashMismatchError(f"chunk {digest.hex()[:12]} came with other bytes")
        return data

    async def put_evidence(self, digest: bytes, piece: bytes) -> None:
        """Hand in a piece of evidence that an accepted Evidence record names. Again is harmless.

        Raises:
            RefusedError: no record names it.
        """
        path = f"/evidence/{digest.hex()}"
        await self._call("PUT", path, MAX_JSON_BYTES, content=piece, headers={"content-type": OCTETS})

    async def _inclusion_proof(self, leaf: int, size: int) -> list[bytes]:
        answer = await self.json("/log/inclusion", leaf=leaf, size=size)
        try:
            return [bytes.fromhex(one) for one in answer["proof"]]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidDataError("the coordinator's inclusion proof is not a list of hashes") from error

    async def _poll(self, path: str, wait_s: float, max_bytes: int, **params: Any) -> bytes | None:
        response = await self._call(
            "GET", path, max_bytes, timeout_s=wait_s + TIMEOUT_S, params={"wait_s": wait_s, **params}
        )
        return None if response.status_code == 204 else response.content

    async def _call(self, method: str, path: str, max_bytes: int, **options: Any) -> httpx.Response:
        self.traffic.sent += len(options.get("content", b""))
        answer = await request(self._http, method, self._base + path, max_bytes, **options)
        self.traffic.received += len(answer.content)
        return answer


def _not_empty(raw: bytes) -> list[Envelope]:
    envelopes = decode_list(raw, max_bytes=MAX_LIST_BYTES)
    if not envelopes:
        raise EncodingError("an empty list where signed records were expected")
    return envelopes
