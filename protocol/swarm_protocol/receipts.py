"""A node checks that what the coordinator acknowledged is in the log: receipts, kept until the plan that they name is there.

A receipt promises that the plan of its round is made from a log that has the record at its leaf. One that the coordinator
does not keep proves what it did, together with the signed plan; only who holds the receipt can show it.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from swarm_protocol.errors import EncodingError, HashMismatchError, InvalidDataError, RefusedError
from swarm_protocol.log import leaf_hash, verify_inclusion
from swarm_protocol.records import Commitment, Envelope, Receipt, RoundPlan
from swarm_protocol.spec import RunSpec

log = logging.getLogger(__name__)

MAX_KEPT = 64

Prove = Callable[[int, int], Awaitable[Sequence[bytes]]]
"""The inclusion proof of a leaf in the log of a size, as the coordinator gives it."""


class Receipts:
    """The newest receipts of our commitments whose plan has not come yet."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._kept: deque[Receipt] = deque(maxlen=MAX_KEPT)

    def note(self, posted: Envelope, receipt: object) -> None:
        """Check what a record was answered with, an encoded Envelope in hex; a commitment's is kept.

        Raises:
            InvalidDataError: not the coordinator's receipt of this record.
        """
        if not isinstance(receipt, str):
            raise EncodingError("the coordinator's receipt is not text")
        try:
            envelope = Envelope.decode(bytes.fromhex(receipt))
        except ValueError as error:
            raise EncodingError("the coordinator's receipt is not hex") from error
        owner = bytes.fromhex(self._spec.coordinator)
        found = envelope.open_as(Receipt, run=self._spec.run_id, key=owner)
        record = posted.open()
        if (found.record, found.leaf_hash) != (record.hash, leaf_hash(posted.encode())):
            raise HashMismatchError("the coordinator's receipt is of another record")
        if isinstance(record, Commitment) and found not in self._kept:
            self._kept.append(found)

    async def check(self, plan: RoundPlan, prove: Prove) -> list[Receipt]:
        """Ask for the proofs of all receipts that a plan has to keep; those that it does not keep, loudly logged.

        Raises:
            UnreachableError: the coordinator does not answer. What is not checked yet stays for the next plan.
        """
        broken = []
        for receipt in [one for one in self._kept if one.round <= plan.round]:
            try:
                if receipt.sequence >= plan.log_size:
                    raise HashMismatchError(f"the plan is made from a log of {plan.log_size} leaves")
                proof = await prove(receipt.sequence, plan.log_size)
                verify_inclusion(receipt.leaf_hash, receipt.sequence, plan.log_size, proof, plan.log_root)
            except (InvalidDataError, RefusedError) as error:
                log.error(
                    "THE COORDINATOR BREAKS ITS RECEIPT: our record %s is not leaf %d of the log that the plan of round %d "
                    "is made from (%s)",
                    receipt.record.hex(), receipt.sequence, plan.round, error,
                )  # fmt: skip
                broken.append(receipt)
            with contextlib.suppress(ValueError):  # a newer receipt may have taken its place meanwhile
                self._kept.remove(receipt)
        return broken
