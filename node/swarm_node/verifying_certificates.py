"""`swarm-node verify certificate`: what somebody earned, checked offline (see `swarm_protocol.certificate`)."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from swarm_protocol.certificate import MAX_CERTIFICATE_BYTES, check, parse
from swarm_protocol.errors import ConfigurationError


def verify(path: Path, *, checkpoint: str | None, run: str | None) -> int:
    """Check a certificate and print what it shows.

    Args:
        checkpoint, run: the root and the run id that it has to be for, in hex; None for any.

    Raises:
        InvalidDataError: it is not valid; says what is wrong.
        ConfigurationError: the file cannot be read, or an argument is no hash.
    """
    wanted_run, wanted_checkpoint = _hash("--run", run), _hash("--checkpoint", checkpoint)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_CERTIFICATE_BYTES + 1)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    certificate = parse(data)
    found = check(certificate, run=wanted_run, checkpoint=wanted_checkpoint)
    balance = found.balance
    console = Console(highlight=False, soft_wrap=True)
    for name, value in (
        ("contributor", found.peer),
        ("run", f"{found.run.hex()} ({found.run_name})"),
        ("settled", f"{balance.settled:,} megaflops"),
        ("pending", f"{balance.pending:,} megaflops, may still be forfeited"),
        ("forfeited", f"{balance.forfeited:,} megaflops"),
        ("checkpoint", f"{found.checkpoint.hex()} after {found.rounds} rounds"),
        ("log", f"{found.log_size} records, root {found.log_root.hex()}"),
        ("calls itself", f"{certificate.name!r}, team {certificate.team!r} (not proved)"),
    ):
        console.print(f"{name:<13}{value}", markup=False)
    if wanted_checkpoint is None:
        console.print(
            "Valid. Compare the checkpoint with one that you trust, or give it: --checkpoint ROOT", markup=False
        )
    else:
        console.print("Valid, for the checkpoint that you gave.", markup=False)
    return 0


def _hash(option: str, text: str | None) -> bytes | None:
    if text is None:
        return None
    try:
        value = bytes.fromhex(text)
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ConfigurationError(f"{option} takes 32 bytes in hex")
    return value
