"""A backup is whole, says when it is not, and a run that is restored from one signs no second history."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest

from swarm_coordinator import backup, config
from swarm_coordinator.app import create_app
from swarm_coordinator.journal import Journal
from swarm_coordinator.rounds import Phase
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.service import open_service
from swarm_protocol.client import CoordinatorClient
from swarm_protocol.errors import ConfigurationError, RefusedError, UnreachableError
from swarm_protocol.identity import Identity
from swarm_protocol.records import Envelope, LogHead, Receipt, Role, RoundManifest, RoundPlan
from swarm_protocol.signing import SigningLedger

MakeStage = Callable[..., Any]


@pytest.fixture
def stage(make_stage: MakeStage) -> Any:
    stage = make_stage(nodes=2)
    stage.play(0)
    return stage


def restored(stage: Any, tmp_path: Path, *, objects: bool = False) -> RunDirectory:
    backup.backup(stage.cast.home, tmp_path / "run.tar", objects=objects)
    home = RunDirectory(tmp_path / "again")
    backup.restore(tmp_path / "run.tar", home.root)
    return home


def entries(journal: Journal) -> list[bytes]:
    return journal.read(lambda archive: [row.envelope for row in archive.leaves(0, 1 << 20)])


def signed(stage: Any, kind: Any) -> Envelope:
    row = stage.journal.read(lambda archive: archive.newest(kind.kind, 1)[0])
    return Envelope.decode(row.envelope)


def hand_in(journal: Journal, envelope: Envelope, now_ms: int) -> str:
    """What the coordinator says to a record: `known`, or the code of its refusal."""
    try:
        answer, _ = journal.submit(envelope, envelope.open(), None, now_ms)
    except RefusedError as error:
        return error.code
    assert not isinstance(answer, RefusedError)
    return "known"


def test_a_run_is_restored_with_everything_it_was_made_of(stage: Any, tmp_path: Path) -> None:
    cast = stage.cast
    config.write(cast.home.config_file, config.CoordinatorConfig().changed("server", port=9))
    with SigningLedger(cast.home.root / "worker" / "signed.db", cast.worker) as ledger:
        ledger.sign(cast.evaluation(0, bytes(32)).open())
    head, log = stage.journal.log_head, entries(stage.journal)
    home = restored(stage, tmp_path, objects=True)
    assert home.config().server.port == 9
    assert home.beacon_seed() == cast.home.beacon_seed()
    names = [path.relative_to(cast.home.root) for path in cast.home.root.rglob("*") if path.is_file()]
    left = {name for name in names if not (home.root / name).exists() and not name.name.startswith("coordinator.db-")}
    assert left == {name for name in left if name.name.endswith(("-wal", "-shm"))}
    assert all(path.stat().st_mode & 0o077 == 0 for path in home.root.rglob("*") if path.is_file())
    assert (tmp_path / "run.tar").stat().st_mode & 0o777 == 0o600
    with SigningLedger(home.root / "worker" / "signed.db", cast.worker) as ledger:
        assert ledger.next_sequence(cast.run, "evaluation", 0) == 1
    journal = Journal.open(home, cast.now_ms)
    assert (journal.log_head, entries(journal)) == (head, log)
    journal.close()


def test_what_is_there_already_is_left_alone(stage: Any, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    backup.backup(stage.cast.home, tmp_path / "run.tar", objects=False)
    with pytest.raises(ConfigurationError, match="exists"):
        backup.backup(stage.cast.home, tmp_path / "run.tar", objects=False)
    with pytest.raises(ConfigurationError, match="new directory"):
        backup.restore(tmp_path / "run.tar", tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())


Change = Callable[[dict[str, bytes]], None]


def flip(name: str) -> Change:
    def change(members: dict[str, bytes]) -> None:
        data = members[name]
        members[name] = data[:-1] + bytes([data[-1] ^ 1])

    return change


def edit(**values: Any) -> Change:
    def change(members: dict[str, bytes]) -> None:
        members["MANIFEST.json"] = json.dumps({**json.loads(members["MANIFEST.json"]), **values}).encode()

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip("beacon.seed"), "beacon.seed differ"),
        (flip("coordinator.db"), "coordinator.db differ"),
        (lambda members: members.pop("coordinator.key"), "coordinator.key differ"),
        (lambda members: members.update({"../escaped": b"x"}), "'../escaped'"),
        (lambda members: members.update({"/escaped": b"x"}), "'/escaped'"),
        (lambda members: members.update({"more": b"x"}), "more differ"),
        (lambda members: members.pop("MANIFEST.json"), "is it whole"),
        (edit(run="00" * 32), "another run"),
        (edit(log_size=1), "another log"),
        (edit(format=99), "that this version knows"),
        (edit(surprise=1), "no backup"),
    ],
)
def test_a_damaged_backup_is_refused_and_leaves_nothing(stage: Any, tmp_path: Path, change: Change, said: str) -> None:
    file = tmp_path / "run.tar"
    backup.backup(stage.cast.home, file, objects=False)
    with tarfile.open(file) as tar:
        members = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
    manifest = members.pop("MANIFEST.json")
    members["MANIFEST.json"] = manifest
    change(members)
    last = members.pop("MANIFEST.json", None)
    with tarfile.open(file, "w") as tar:
        for name, data in [*members.items(), *([] if last is None else [("MANIFEST.json", last)])]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigurationError, match=said):
        backup.restore(file, tmp_path / "again")
    assert sorted(tmp_path.iterdir()) == before


def test_half_a_backup_is_refused(stage: Any, tmp_path: Path) -> None:
    file = tmp_path / "run.tar"
    backup.backup(stage.cast.home, file, objects=False)
    data = file.read_bytes()
    for size in (0, 1000, len(data) // 2):
        file.write_bytes(data[:size])
        with pytest.raises(ConfigurationError, match="damaged"):
            backup.restore(file, tmp_path / "again")


def test_a_log_that_was_rewritten_does_not_fit_its_heads(stage: Any, tmp_path: Path) -> None:
    stage.journal.close()
    (row,) = stage.journal.read(lambda archive: archive.leaves(1, 1))
    other = stage.cast.registration(Identity.from_seed(b"s" * 32)).encode()
    with stage.journal._engine.begin() as connection:
        connection.exec_driver_sql("UPDATE records SET envelope = ? WHERE id = ?", (other, row.id))
    with pytest.raises(ConfigurationError, match="not the one that the run signed a head of"):
        backup.backup(stage.cast.home, tmp_path / "run.tar", objects=False)


def test_a_restored_run_signs_nothing_until_its_nodes_were_asked_and_then_goes_on(stage: Any, tmp_path: Path) -> None:
    cast = stage.cast
    home = restored(stage, tmp_path)
    journal = Journal.open(home, cast.now_ms)
    head = journal.log_head
    assert journal.recovering
    assert hand_in(journal, cast.ready(cast.nodes[0], 1, journal.state.base), cast.now_ms) == "recovering"
    assert hand_in(journal, signed(stage, RoundPlan), cast.now_ms) == "known"
    assert hand_in(journal, signed(stage, RoundManifest), cast.now_ms) == "known"
    row = stage.journal.read(lambda archive: archive.leaves(head[0] - 8, 8))
    receipts = [Envelope.decode(one.receipt) for one in row if one.receipt]
    assert receipts
    assert {hand_in(journal, one, cast.now_ms) for one in receipts} == {"known"}
    assert not journal.appoint(Role.AUDITOR, b"k" * 32, cast.now_ms)
    cast.now_ms += journal.state.policy.presence_ms - 1
    journal.tick(cast.now_ms)
    assert journal.recovering
    assert journal.log_head == head
    cast.now_ms += 1
    journal.tick(cast.now_ms)
    assert not journal.recovering
    stage.journal.close()
    stage.journal = journal
    stage.play(1)
    assert journal.state.round == 2
    journal.close()
    journal = Journal.open(home, cast.now_ms)
    assert not journal.recovering
    journal.close()


def test_a_backup_older_than_what_was_signed_is_not_gone_on_from(stage: Any, tmp_path: Path) -> None:
    cast = stage.cast
    home = restored(stage, tmp_path)
    stage.play(1)
    journal = Journal.open(home, cast.now_ms)
    assert hand_in(journal, signed(stage, RoundPlan), cast.now_ms) == "backup-too-old"
    assert "restore a newer backup" in str(journal.failure)
    cast.now_ms += 10**6
    journal.tick(cast.now_ms)
    assert journal.recovering
    assert journal.state.phase is Phase.ASSEMBLING
    journal.close()
    with pytest.raises(ConfigurationError, match="holds the plan of round 1"):
        Journal.open(home, cast.now_ms)


def test_a_receipt_or_a_head_of_a_longer_log_says_the_same(stage: Any, tmp_path: Path) -> None:
    cast = stage.cast
    coordinator = Identity.load(cast.home.coordinator_key)
    home = restored(stage, tmp_path)
    journal = Journal.open(home, cast.now_ms)
    size, root = journal.log_head
    short = LogHead(run=cast.run, round=0, sequence=size, root=root)
    assert hand_in(journal, Envelope.sign(coordinator, short), cast.now_ms) == "known"
    forged = Envelope.sign(cast.nodes[0], LogHead(run=cast.run, round=0, sequence=size + 1, root=bytes(32)))
    assert hand_in(journal, forged, cast.now_ms) == "recovering"
    longer = Receipt(run=cast.run, round=2, sequence=size, record=bytes(32), leaf_hash=bytes(32))
    assert hand_in(journal, Envelope.sign(coordinator, longer), cast.now_ms) == "backup-too-old"
    journal.close()


def test_a_client_hands_in_what_it_has_seen(stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cast = stage.cast
    home = restored(stage, tmp_path)
    stage.play(1)
    stage.journal.close()

    async def play() -> None:
        def connected(service: Any) -> httpx.AsyncClient:
            return httpx.AsyncClient(transport=httpx.ASGITransport(create_app(service)))

        async with open_service(cast.home, cast.clock) as service:
            client = CoordinatorClient(connected(service), "http://test", cast.spec, None)
            plan = await client.plan(1)
            assert plan is not None
            assert await client.manifest(plan) is not None
        async with open_service(home, cast.clock) as service:
            client._http = connected(service)
            assert (await client.status())["recovering"]
            assert (await client._http.get(f"http://test/v1/runs/{cast.run.hex()}/peers")).json()["recovering"]
            with pytest.raises(UnreachableError, match="restored from a backup"):
                await client.post(cast.ready(cast.nodes[0], 1, plan.base))
            await client.hand_in()
            assert service.failure is not None
            assert "holds the plan of round 1" in service.failure

    anyio.run(play)


def test_a_coordinator_whose_backup_is_too_old_says_so_and_exits(stage: Any, tmp_path: Path) -> None:
    home = restored(stage, tmp_path)
    stage.play(1)
    plan = signed(stage, RoundPlan).encode()
    command = [sys.executable, "-m", "swarm_coordinator", "serve", str(home.root), "--no-workers", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            answer = httpx.post(f"{url}/v1/runs/{stage.cast.run.hex()}/records", content=plan, timeout=10)
            assert (answer.status_code, answer.json()["code"]) == (409, "backup-too-old")
            _, said = process.communicate(timeout=20)
            assert process.returncode == 2
            assert "the backup is older than what was signed" in said.splitlines()[-1]
        finally:
            process.kill()


def test_backup_and_restore_are_commands(stage: Any, tmp_path: Path) -> None:
    def command(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "swarm_coordinator", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "give --objects" in command("backup", stage.cast.home.root, tmp_path / "run.tar")
    said = command("restore", tmp_path / "run.tar", tmp_path / "again")
    assert "every signed head fits" in said
    assert "put the folder `objects` here" in said
    assert "restored from a backup" in command("status", tmp_path / "again")


@pytest.mark.swarm
def test_with_postgresql_the_database_is_restored_first(stage: Any, tmp_path: Path, postgres: Any) -> None:
    cast = stage.cast
    empty = config.CoordinatorConfig().changed("database", url=postgres.database())
    config.write(cast.home.config_file, empty)
    found = backup.backup(cast.home, tmp_path / "run.tar", objects=False)
    assert not found.has_database
    with pytest.raises(ConfigurationError, match="with pg_restore"):
        backup.restore(tmp_path / "run.tar", tmp_path / "again")
    Journal.open(cast.home, cast.now_ms).close()
    backup.restore(tmp_path / "run.tar", tmp_path / "again")
    journal = Journal.open(RunDirectory(tmp_path / "again"), cast.now_ms)
    assert journal.recovering
    journal.close()


def test_a_database_elsewhere_and_objects_elsewhere_come_home(stage: Any, tmp_path: Path) -> None:
    cast = stage.cast
    stage.journal.close()
    moved, folder = tmp_path / "elsewhere.db", tmp_path / "objects elsewhere"
    cast.home.database.rename(moved)
    cast.home.objects.rename(folder)
    there = config.CoordinatorConfig().changed("database", url=f"sqlite:///{moved}")
    config.write(cast.home.config_file, there.changed("objects", url=folder.as_uri()))
    home = restored(stage, tmp_path, objects=True)
    assert home.config().database.url is home.config().objects.url is None
    names = {path.name for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in home.objects.rglob("*") if path.is_file()} == names
    assert home.database.exists()


def test_objects_in_a_bucket_are_backed_up_there(stage: Any, tmp_path: Path) -> None:
    config.write(stage.cast.home.config_file, config.CoordinatorConfig().changed("objects", url="s3://bucket/run"))
    with pytest.raises(ConfigurationError, match="back them up there"):
        backup.backup(stage.cast.home, tmp_path / "run.tar", objects=True)
    assert not backup.backup(stage.cast.home, tmp_path / "run.tar", objects=False).has_objects


def test_objects_that_are_deleted_meanwhile_are_left_out(
    stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Path(stage.cast.home.objects) / "chunks" / bytes(32).hex()
    gone.write_bytes(b"garbage")
    listed = backup._blobs

    def deleting(folder: Path) -> list[Path]:
        found = list(listed(folder))
        gone.unlink()
        return found

    monkeypatch.setattr(backup, "_blobs", deleting)
    home = restored(stage, tmp_path, objects=True)
    chunks = home.objects / "chunks"
    assert {path.name for path in chunks.iterdir()} == {path.name for path in gone.parent.iterdir()}
