"""The red team: dishonest ways to train and to average, for tests and `swarm-node demo --cheaters`; audits must catch them.

Only the names are here, so that commands load fast; `kinds` says what each does.
"""

from enum import StrEnum


class Kind(StrEnum):
    """What a cheater does. `copied`, `stale-checkpoint` and `sleeper` need earlier rounds, and are honest without;
    `lying-reducer` does honest work, and publishes wrong averages of it."""

    WRONG_SHARD = "wrong-shard"
    HALF_BATCH = "half-batch"
    FEWER_STEPS = "fewer-steps"
    SKIPPED_STEP = "skipped-step"
    STALE_CHECKPOINT = "stale-checkpoint"
    LEARNING_RATE = "learning-rate"
    LEARNING_RATE_SLIGHT = "learning-rate-slight"
    LOW_PRECISION = "low-precision"
    MADE_UP = "made-up"
    SCALED = "scaled"
    SIGN_FLIP = "sign-flip"
    COPIED = "copied"
    OTHER_PARTS = "other-parts"
    SLEEPER = "sleeper"
    REFUSES_EVIDENCE = "refuses-evidence"
    FORGED_EVIDENCE = "forged-evidence"
    FORGED_STATES = "forged-states"
    FLIPPED_BIT = "flipped-bit"
    LYING_REDUCER = "lying-reducer"
