"""Certificates of credit: what somebody has earned in a run, for a third party to verify offline.

A certificate carries everything that it is checked with: the run's spec, whose hash is the run id and which names the
coordinator's key; the coordinator's newest statement of credit, with the root over all balances; the holder's balance and its
proof under that root; and a signed head of the run's log with a proof that the statement is in it. Name and team are for
people, and proved by nothing.

What a valid certificate shows: this coordinator signed that this key had this credit when the checkpoint had this root, and
cannot have signed another statement of that number without equivocating. That the credit follows from the run's records is
shown by `verify log`, with the same log head.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from swarm_protocol.errors import ConfigurationError, HashMismatchError, InvalidDataError
from swarm_protocol.identity import peer_id
from swarm_protocol.ledger import Balance
from swarm_protocol.log import leaf_hash, verify_inclusion
from swarm_protocol.records import CreditStatement, Envelope, LogHead
from swarm_protocol.spec import MAX_SPEC_BYTES, RunSpec

FORMAT: Literal["swarm-node certificate 1"] = "swarm-node certificate 1"
MAX_CERTIFICATE_BYTES = 4 << 20
MAX_PROOF = 64

HexText = Annotated[str, Field(pattern=r"^([0-9a-f]{2})*$", max_length=MAX_CERTIFICATE_BYTES)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Proof = Annotated[list[Digest], Field(max_length=MAX_PROOF)]
Amount = Annotated[int, Field(ge=0, lt=1 << 63)]
Index = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CertifiedBalance(_Model):
    key: Digest
    pending: Amount = Field(description="megaflops that may still be forfeited")
    settled: Amount = Field(description="megaflops")
    forfeited: Amount = Field(description="megaflops")


class LoggedStatement(_Model):
    """Where the statement is in the run's log."""

    leaf: Index
    proof: Proof = Field(description="the inclusion proof of the leaf under the head's root, lowest first")
    head: HexText = Field(description="the encoded Envelope of a LogHead that the coordinator signed")


class Certificate(_Model):
    """The JSON of a certificate. Bytes are lower-case hex."""

    format: Literal["swarm-node certificate 1"]
    name: Annotated[str, Field(max_length=64)] = Field(description="information, not proved")
    team: Annotated[str, Field(max_length=64)] = Field(description="information, not proved")
    spec: Annotated[HexText, Field(max_length=2 * MAX_SPEC_BYTES)] = Field(description="the RunSpec's canonical bytes")
    statement: HexText = Field(description="the encoded Envelope of the newest CreditStatement")
    balance: CertifiedBalance
    index: Index = Field(description="the balance's place in the tree of all balances, in the order of keys")
    proof: Proof = Field(description="the inclusion proof of the balance under the statement's root, lowest first")
    log: LoggedStatement


@dataclass(frozen=True)
class Certified:
    """What a certificate shows. Amounts in megaflops; `checkpoint` is the root of the newest one then."""

    run: bytes
    run_name: str
    balance: Balance
    checkpoint: bytes
    rounds: int
    statement: int
    log_size: int
    log_root: bytes

    @property
    def peer(self) -> str:
        return peer_id(self.balance.key)


def parse(data: bytes) -> Certificate:
    """Raises `InvalidDataError` for what is no certificate."""
    if len(data) > MAX_CERTIFICATE_BYTES:
        raise InvalidDataError(f"a certificate has at most {MAX_CERTIFICATE_BYTES} bytes")
    try:
        return Certificate.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise InvalidDataError(f"this is no certificate: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidDataError("this is no certificate: the file is not JSON") from error


def check(certificate: Certificate, *, run: bytes | None = None, checkpoint: bytes | None = None) -> Certified:
    """What a certificate shows, after everything in it was checked.

    Args:
        run: the run that it has to be of; None for any.
        checkpoint: the root of the checkpoint that it has to be for; None for any.

    Raises:
        InvalidDataError: says what is wrong; it shows nothing then.
    """
    try:
        spec = RunSpec.decode(bytes.fromhex(certificate.spec))
    except ConfigurationError as error:
        raise InvalidDataError(f"the certificate's run cannot be read: {error}") from error
    if run is not None and spec.run_id != run:
        raise HashMismatchError(f"the certificate is of run {spec.run_id.hex()}, not of {run.hex()}")
    coordinator = bytes.fromhex(spec.coordinator)
    raw = bytes.fromhex(certificate.statement)
    statement = Envelope.decode(raw).open_as(CreditStatement, run=spec.run_id, key=coordinator)
    head = Envelope.decode(bytes.fromhex(certificate.log.head)).open_as(LogHead, run=spec.run_id, key=coordinator)
    held = certificate.balance
    balance = Balance(bytes.fromhex(held.key), held.pending, held.settled, held.forfeited)
    try:
        verify_inclusion(
            leaf_hash(balance.encode()),
            certificate.index,
            statement.accounts,
            _digests(certificate.proof),
            statement.balances,
        )
    except HashMismatchError as error:
        raise HashMismatchError(f"the balance is not one that the coordinator signed: {error}") from error
    logged = certificate.log
    try:
        verify_inclusion(leaf_hash(raw), logged.leaf, head.sequence, _digests(logged.proof), head.root)
    except HashMismatchError as error:
        raise HashMismatchError(f"the statement is not in the run's log: {error}") from error
    if checkpoint is not None and statement.checkpoint != checkpoint:
        raise HashMismatchError(
            f"the certificate is for checkpoint {statement.checkpoint.hex()}, not for {checkpoint.hex()}"
        )
    return Certified(
        run=spec.run_id,
        run_name=spec.name,
        balance=balance,
        checkpoint=statement.checkpoint,
        rounds=statement.round + 1,
        statement=statement.sequence,
        log_size=head.sequence,
        log_root=head.root,
    )


def _digests(proof: list[str]) -> list[bytes]:
    return [bytes.fromhex(one) for one in proof]
