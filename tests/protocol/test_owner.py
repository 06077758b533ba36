"""What the run owner orders: done once, by the coordinator, also where it was not running; and the commands themselves."""

from __future__ import annotations

import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swarm_coordinator import owner
from swarm_coordinator.journal import Journal
from swarm_coordinator.rounds import Phase
from swarm_protocol.errors import ConfigurationError, RefusedError
from swarm_protocol.history import History
from swarm_protocol.identity import Identity, peer_id
from swarm_protocol.records import Ban, Role, RunEnd

MakeCast = Callable[..., Any]
MakeStage = Callable[..., Any]

ON_EVERY_DATABASE = pytest.mark.usefixtures("database_url")

COMMAND = [sys.executable, "-m", "swarm_coordinator"]


def ordered(stage: Any, kind: str, **argument: str) -> str:
    """Order something, let the coordinator find it, and read its answer."""
    assert owner.order(stage.cast.home, kind, argument, wait_s=0.0) is None
    stage.journal.carry_out_orders(stage.cast.now_ms)
    return answers(stage.cast)[-1]


def answers(cast: Any) -> list[str]:
    with owner.transaction(cast.home) as (session, _):
        return [row.answer for row in session.query(owner.OrderRow).order_by(owner.OrderRow.id)]


def verified(stage: Any) -> History:
    """What anybody makes of the log."""
    history = History(stage.cast.spec)
    for envelope in stage.log():
        history.add(envelope)
    return history


@ON_EVERY_DATABASE
def test_a_paused_run_begins_no_round_until_it_is_resumed(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=2)
    assert ordered(stage, "resume") == "the run was not paused; nothing was changed"
    assert ordered(stage, "pause") == "paused; round 0 has not begun"
    stage.submit(*(stage.cast.ready(node, 0, stage.journal.state.base) for node in stage.standing))
    stage.later(60_000)
    assert (stage.journal.state.phase, stage.journal.state.paused) == (Phase.ASSEMBLING, True)
    assert ordered(stage, "resume") == "rounds begin again"
    stage.play(0)
    assert stage.journal.state.round == 1


@ON_EVERY_DATABASE
def test_an_order_that_came_while_nobody_served_the_run_is_carried_out_once_somebody_does(
    make_stage: MakeStage,
) -> None:
    stage = make_stage(nodes=2)
    stage.journal.close()
    assert owner.order(stage.cast.home, "pause", {}, wait_s=0.0) is None
    stage.journal = Journal.open(stage.cast.home, stage.cast.now_ms)
    stage.journal.carry_out_orders(stage.cast.now_ms)
    stage.journal.close()
    stage.journal = Journal.open(stage.cast.home, stage.cast.now_ms)
    assert stage.journal.state.paused
    stage.journal.carry_out_orders(stage.cast.now_ms)
    assert answers(stage.cast) == ["paused; round 0 has not begun"]


@ON_EVERY_DATABASE
def test_a_run_that_is_stopped_ends_with_a_signed_record(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=2)
    stage.play(0)
    assert ordered(stage, "stop") == "the run has ended"
    end = stage.newest(RunEnd)
    assert (end.round, end.root, end.reason) == (1, stage.journal.state.base, "stopped by the run owner")
    with pytest.raises(RefusedError, match="stopped by the run owner") as refused:
        stage.submit(stage.cast.ready(stage.standing[0], 1, stage.journal.state.base))
    assert refused.value.code == "run-finished"
    assert ordered(stage, "pause") == "the run has finished; nothing was changed"
    verified(stage)


@ON_EVERY_DATABASE
def test_who_is_banned_loses_its_slot_at_once_and_its_standing_for_good(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=2)
    stage.submit(*(stage.cast.ready(node, 0, stage.journal.state.base) for node in stage.standing))
    stage.later(5_000)
    assert stage.journal.state.phase is Phase.TRAINING
    key = stage.standing[0].public_key
    assert ordered(stage, "ban", key=key.hex(), reason="spam") == (
        f"{peer_id(key)} is banned: its slot is free, and its pending credit forfeited"
    )
    ban = stage.newest(Ban)
    assert (ban.key, ban.reason) == (key, "spam")
    assert key in stage.journal.state.ended
    assert "its standing had ended: spam" in ordered(stage, "ban", key=key.hex(), reason="again")
    stranger = Identity.from_seed(b"s" * 32).public_key
    assert "it has not registered" in ordered(stage, "ban", key=stranger.hex(), reason="who?")
    with pytest.raises(RefusedError, match="spam"):
        stage.submit(stage.cast.registration(stage.standing[0], sequence=1))
    assert verified(stage).account(key).ended == "spam"


@pytest.mark.parametrize(("kind", "argument"), [("dance", "{}"), ("ban", "{}"), ("ban", "no json"), ("ban", "[]")])
def test_a_damaged_order_is_answered_and_changes_nothing(make_stage: MakeStage, kind: str, argument: str) -> None:
    stage = make_stage(nodes=2)
    with owner.transaction(stage.cast.home) as (session, run):
        session.add(owner.OrderRow(run=run, kind=kind, argument=argument, ordered_ms=0))
    head = stage.journal.log_head
    stage.journal.carry_out_orders(stage.cast.now_ms)
    assert "was not carried out" in answers(stage.cast)[0]
    assert stage.journal.log_head == head


@ON_EVERY_DATABASE
def test_orders_and_a_busy_coordinator_do_not_get_in_each_others_way(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=2)
    done = threading.Event()

    def coordinate() -> None:
        while not done.is_set():
            stage.journal.mark_alive(stage.cast.now_ms)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(coordinate)
        try:
            for _ in range(30):
                owner.order(stage.cast.home, "resume", {}, wait_s=0.0)
        finally:
            done.set()
        busy.result()
    stage.journal.carry_out_orders(stage.cast.now_ms)
    assert answers(stage.cast) == ["the run was not paused; nothing was changed"] * 30


@pytest.mark.parametrize(("text", "ms"), [("90s", 90_000), ("7d", 7 * 86_400_000), ("2w", 14 * 86_400_000)])
def test_durations_are_read(text: str, ms: int) -> None:
    assert owner.duration_ms(text) == ms


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "0d", "7 d", "1y"])
def test_what_is_no_duration_is_said(text: str) -> None:
    with pytest.raises(ConfigurationError, match="such as 7d"):
        owner.duration_ms(text)


def command(*arguments: object, status: int = 0) -> str:
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@contextmanager
def served(home: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A coordinator, and its address."""
    program = [*COMMAND, "serve", str(home), "--no-workers", "--port", "0", *options]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r" at (https?://\S+)", process.stdout.readline())
            assert found is not None
            yield process, found[1]
        finally:
            process.kill()


@ON_EVERY_DATABASE
def test_the_commands_work_beside_a_running_coordinator(make_cast: MakeCast) -> None:
    cast = make_cast()
    home = cast.home.root
    with served(home) as (process, url):
        assert command("pause", home) == "paused; round 0 has not begun\n"
        status = json.loads(command("status", url, "--json"))
        assert (status["run"]["paused"], status["served"]) == (True, True)
        page = command("status", home)
        assert "round        0 of 2, assembling, paused by its owner" in page
        assert "coordinator  running" in page
        assert command("stop", home, "--yes") == "the run has ended\n"
        assert "finished: stopped by the run owner" in command("status", url)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
    assert "coordinator  not running" in command("status", home)


def test_the_commands_that_decide_who_joins(make_cast: MakeCast) -> None:
    home = make_cast().home
    peer = Identity.from_seed(b"s" * 32).peer_id
    made = command("invite", home.root, "--uses", "3", "--expires", "7d", "--label", "for ada")
    token = re.search(r"token    (\S{32})\n", made)
    assert token is not None
    assert f"swarm-node join http://127.0.0.1:8470 --token {token[1]} --trust 12D3" in made
    listed = command("invite", home.root, "--list")
    assert re.search(r"^[0-9a-f]{16}  0 of 3 used, until \S+ \S+  for ada$", listed, re.MULTILINE)
    assert token[1] not in listed
    assert command("invite", home.root, "--revoke", listed[:16]) == "withdrawn: 1\n"
    assert "expired" in command("invite", home.root, "--list")
    assert "there is no invitation" in command("invite", home.root, "--revoke", "nobody", status=2)
    assert "may register" in command("allow", home.root, peer, "--label", "bob")
    assert command("allow", home.root) == f"{peer}  bob\n"
    assert "off the list" in command("allow", home.root, peer, "--remove")
    assert "is no key" in command("allow", home.root, "nonsense", status=2)
    assert "takes effect when one next serves" in command("ban", home.root, peer, "--reason", "spam")


def test_keys_are_shown_without_their_secrets(make_cast: MakeCast) -> None:
    cast = make_cast()
    shown = command("keys", cast.home.root)
    for identity in (Identity.load(cast.home.coordinator_key), cast.worker, *cast.auditors):
        assert identity.peer_id in shown
        assert identity.public_key.hex() in shown
        assert identity.seed.hex() not in shown
    assert "coordinator.key (mode 0600)" in shown
    assert "beacon.seed (mode 0644, OPEN TO OTHERS: chmod 600" in shown
    cast.home.coordinator_key.chmod(0o644)
    assert "chmod 600" in command("keys", cast.home.root, status=2)


def test_a_wrong_configuration_is_said_before_anything_is_served(make_cast: MakeCast) -> None:
    home = make_cast().home
    home.config_file.write_text('[server]\nport = "many"\n')
    said = command("serve", home.root, status=2)
    assert "server.port" in said
    assert said.count("\n") <= 3


def test_a_run_is_served_with_tls(make_cast: MakeCast, tmp_path: Path) -> None:
    certificate, key = self_signed(tmp_path)
    options = ["--tls-certificate", str(certificate), "--tls-key", str(key)]
    cast = make_cast()
    with served(cast.home.root, *options) as (process, url):
        assert url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificate))
        with urllib.request.urlopen(f"{url}/v1/runs", context=trusted, timeout=10) as response:
            assert json.load(response)[0]["run_id"] == cast.run.hex()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    key.write_text("no key")
    assert "cannot be used" in command("serve", cast.home.root, *options, "--no-workers", "--port", "0", status=2)


@pytest.mark.parametrize(("proxies", "last", "metrics"), [('["127.0.0.1"]', 429, 403), ("[]", 200, 200)])
def test_a_proxy_is_believed_where_the_configuration_names_it(
    make_cast: MakeCast, proxies: str, last: int, metrics: int
) -> None:
    home = make_cast().home
    home.config_file.write_text(
        f"[server]\nbehind_proxy = {proxies}\n[limits]\naddress_per_s = 0.01\naddress_burst = 2\n"
    )
    with served(home.root) as (process, url):
        told = [httpx.get(f"{url}/v1/runs", headers={"x-forwarded-for": "192.0.2.1"}).status_code for _ in range(3)]
        assert told == [200, 200, last]
        assert httpx.get(f"{url}/metrics", headers={"x-forwarded-for": "192.0.2.2"}).status_code == metrics
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def self_signed(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, and its key."""
    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private.public_key())
    builder = (
        builder.serial_number(1).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    )
    alternative = x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))])
    made = builder.add_extension(alternative, critical=False).sign(private, hashes.SHA256())
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate, key


@ON_EVERY_DATABASE
def test_an_auditor_is_dismissed_for_good_but_never_so_many_that_none_could_reject(make_stage: MakeStage) -> None:
    stage = make_stage(nodes=2)
    key = stage.cast.auditors[0].public_key
    assert "appoint another one first" in ordered(stage, "dismiss", key=key.hex(), reason="lost")
    third = Identity.from_seed(b"3" * 32).public_key
    stage.cast.home.appoint(third)
    stage.journal.appoint(Role.AUDITOR, third, stage.cast.now_ms)
    assert (
        ordered(stage, "dismiss", key=key.hex(), reason="lost") == f"{peer_id(key)} audits no more; 2 auditors are left"
    )
    assert "is no auditor of this run" in ordered(stage, "dismiss", key=key.hex(), reason="lost")
    stage.journal.appoint(Role.AUDITOR, key, stage.cast.now_ms)
    assert verified(stage).auditors() == {stage.cast.auditors[1].public_key, third}
    done = subprocess.run(
        [*COMMAND, "appoint", str(stage.cast.home.root), key.hex()], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, "which is for good" in done.stderr) == (2, True)
