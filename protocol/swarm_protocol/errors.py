"""One tree of errors, told apart by what the caller can do about them.

Every message says what is wrong and, where a person may read it, what to do next.
"""

from __future__ import annotations


class SwarmError(Exception):
    """Root of every error that this project raises on purpose."""

    exit_code = 1


class ConfigurationError(SwarmError):
    """A setting, a file or this machine has to be changed by a person; trying again does not help."""

    exit_code = 2


class UnsupportedPlatformError(ConfigurationError):
    """This machine cannot take part."""

    exit_code = 3


class InvalidDataError(SwarmError):
    """Bytes that came from outside break a rule of the protocol. Drop them, and remember who sent them."""


class EncodingError(InvalidDataError):
    """Bytes are not the canonical encoding, or exceed a limit."""


class SignatureError(InvalidDataError):
    """A signature does not fit its record, or the signer has no right to it."""


class HashMismatchError(InvalidDataError):
    """Bytes are not those that the hash promised. Try the next source."""


class RefusedError(SwarmError):
    """The other side understood and said no; `reason` is its sentence, `status` the HTTP status where there was one."""

    def __init__(self, reason: str, *, status: int | None = None, code: str = "refused") -> None:
        super().__init__(reason)
        self.reason = reason
        self.status = status
        self.code = code


class UnreachableError(SwarmError):
    """Nobody answered in time, or asks us to wait `retry_after_s` at least. Trying again later may help."""

    def __init__(self, reason: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class EquivocationError(SwarmError):
    """A key would sign, or has signed, two different records for one (run, kind, round, sequence)."""


class DivergenceError(SwarmError):
    """Our checkpoint is not the one that the manifest names: fetch the right one."""
