"""What the audit policy costs and catches, simulated with the very functions that draw and decide in a run.

    python benchmarks/policy.py [--json] [--nodes N] [--rounds R] [--segments S]

Cost: replayed steps over trained steps, by round, for a population that joins at once and is honest; every audit replays one
segment of S, or all of them on probation, and one audit in eight is done twice. Catch: rounds until a trusted identity is
rejected that cheats in a share f of its rounds, in the whole contribution or in one segment of it, against the formula
1 / (f · p) and 1 / (f · p / S), where p is the floor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
from dataclasses import dataclass

from swarm_protocol.draw import Drawable, drawn, nonce_hash
from swarm_protocol.policy import CROSS_CHECK_ONE_IN, Account, ruling
from swarm_protocol.records import BeaconReveal, Outcome, SlotNonce
from swarm_protocol.spec import AuditSpec

TOKENS = 1 << 16
"""Of a contribution; all are of full size."""


@dataclass(frozen=True)
class Round:
    """One round's draw among identities with these accounts."""

    audit: AuditSpec
    segments: int
    number: int
    seed: int

    def draw(self, accounts: list[Account]) -> dict[int, tuple[int, ...]]:
        nonces = [
            hashlib.blake2b(b"%d %d %d" % (self.seed, self.number, slot), digest_size=32).digest()
            for slot in range(len(accounts))
        ]
        reveal = BeaconReveal(
            run=bytes(32),
            round=self.number,
            value=hashlib.blake2b(b"%d %d" % (self.seed, self.number), digest_size=32).digest(),
            manifest=bytes(32),
            openings=tuple(SlotNonce(slot=slot, nonce=nonce) for slot, nonce in enumerate(nonces)),
        )
        listed = [
            Drawable(slot, nonce_hash(nonces[slot]), TOKENS, self.segments, account.vouched_tokens)
            for slot, account in enumerate(accounts)
        ]
        return drawn(self.audit, TOKENS, reveal, listed)


def cost(audit: AuditSpec, nodes: int, rounds: int, segments: int) -> list[float]:
    """Share of the training that audits replay, by round."""
    accounts, shares = [Account() for _ in range(nodes)], []
    for number in range(rounds):
        chosen = Round(audit, segments, number, 0).draw(accounts)
        replayed = sum(len(found) for found in chosen.values()) / segments
        shares.append(replayed / nodes * (1 + 1 / CROSS_CHECK_ONE_IN))
        for slot in chosen:
            accounts[slot] = ruling(accounts[slot], Outcome.ACCEPTED, round=number, tokens=TOKENS, policy=audit).account
    return shares


def rounds_until_caught(audit: AuditSpec, segments: int, share: float, whole: bool, trials: int) -> float:
    """The mean over trials: an identity so trusted that only the floor is left, which cheats from now on."""
    trusted = Account(vouched_tokens=TOKENS * (audit.probation + int(1 / audit.floor) + 1))
    left, found = list(range(trials)), []
    chance = random.Random(1)
    for number in range(1_000_000):
        chosen = Round(audit, segments, number, 1).draw([trusted] * len(left))
        caught = {
            slot
            for slot, drawn_segments in chosen.items()
            if chance.random() < share and (whole or chance.randrange(segments) in drawn_segments)
        }
        found += [number + 1] * len(caught)
        left = [one for slot, one in enumerate(left) if slot not in caught]
        if not left:
            return statistics.mean(found)
    raise AssertionError("somebody was never caught")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--nodes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--segments", type=int, default=5)
    parser.add_argument("--trials", type=int, default=300)
    arguments = parser.parse_args()
    audit = AuditSpec()
    shares = cost(audit, arguments.nodes, arguments.rounds, arguments.segments)
    tail = shares[-arguments.rounds // 10 :]
    reached = next((number for number in range(len(shares)) if statistics.mean(shares[number:][:20]) <= 0.015), None)
    print(f"{arguments.nodes} honest identities, {arguments.segments} segments, floor {audit.floor:.0%}: replayed are")
    for number in (0, 10, 20, 50, 100, 200, len(shares) - 20):
        if number + 20 <= len(shares):
            print(f"  rounds {number:>4}-{number + 19:<4} {statistics.mean(shares[number:][:20]):8.3%}")
    print(f"  at most 1.5 % from round {reached} on; {statistics.mean(tail):.3%} over the last {len(tail)} rounds")
    caught = []
    for share in (1.0, 0.5, 0.1):
        for whole in (True, False):
            p = share * audit.floor / (1 if whole else arguments.segments)
            mean = rounds_until_caught(audit, arguments.segments, share, whole, arguments.trials)
            caught.append({"f": share, "whole": whole, "rounds": round(mean, 1), "formula": round(1 / p, 1)})
            what = "whole contribution" if whole else "one segment"
            print(
                f"  cheats in {share:4.0%} of its rounds, {what:<18}: caught after {mean:7.1f} rounds (formula {1 / p:7.1f})"
            )
    if arguments.json:
        print(
            json.dumps(
                {
                    "audit_share": round(statistics.mean(tail), 5),
                    "below_1_5_percent_from_round": reached,
                    "caught": caught,
                }
            )
        )


if __name__ == "__main__":
    main()
