"""The chain of checkpoints, as the coordinator lists and signs it, and as the log has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from swarm_coordinator.store import Store
from swarm_protocol import parts
from swarm_protocol.chunks import CHUNK_BYTES
from swarm_protocol.errors import InvalidDataError
from swarm_protocol.history import History
from swarm_protocol.identity import Identity
from swarm_protocol.layout import checkpoint_bytes, checkpoint_manifest, layout_hash
from swarm_protocol.records import CheckpointManifest, CommitmentSet, Envelope, RoundManifest, RoundPlan

Api = Any
MakeCast = Callable[..., Any]
Play = Callable[..., None]


def test_the_chain_is_listed_newest_first_with_what_is_kept_whole(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()
    first, second = bytes.fromhex(cast.spec.checkpoint), b"r" * 32

    async def script(api: Api) -> None:
        begun = (await api.get("/checkpoints")).json()
        assert [(one["round"], one["delta_bytes"]) for one in begun["checkpoints"]] == [(0, None)]
        await api.to_audits()
        page = (await api.get("/checkpoints?limit=1")).json()
        newest, rest = page["checkpoints"][0], (await api.get(f"/checkpoints?before={page['next']}")).json()
        assert (newest["round"], newest["root"], newest["parent"]) == (1, second.hex(), first.hex())
        assert newest["size_bytes"] == checkpoint_bytes(cast.spec)
        assert newest["delta_bytes"] == sum(parts.encoded_part_bytes(cast.spec, part) for part in range(2))
        assert [(one["round"], one["whole"]) for one in rest["checkpoints"]] == [(0, True)]
        assert (newest["whole"], rest["next"]) == (False, None)
        for number, root, parent in ((0, first, None), (1, second, first)):
            signed = await api.get(f"/checkpoints/{root.hex()}/manifest")
            record = Envelope.decode(signed.content).open_as(
                CheckpointManifest, run=cast.run, round=number, key=bytes.fromhex(cast.spec.coordinator)
            )
            assert record == checkpoint_manifest(cast.spec, number, root, parent)
            assert (record.layout, record.chunk_bytes) == (layout_hash(cast.spec), CHUNK_BYTES)

    play(cast, script)


def test_a_checkpoint_that_is_not_kept_whole_says_so(make_cast: MakeCast, play: Play) -> None:
    cast = make_cast()

    async def script(api: Api) -> None:
        await api.to_audits()
        Store(cast.home.objects).delete_states([bytes.fromhex(cast.spec.checkpoint)])
        for root, code in (
            (cast.spec.checkpoint, "not-whole"),
            ((b"r" * 32).hex(), "not-whole"),
            ("ab" * 32, "not-found"),
        ):
            answer = await api.get(f"/checkpoints/{root}")
            assert (answer.status_code, answer.json()["code"]) == (404, code)
        assert (await api.get(f"/checkpoints/{'ab' * 32}/manifest")).status_code == 404

    play(cast, script)


def replayed(stage: Any, log: list[Envelope]) -> History:
    history = History(stage.cast.spec)
    for envelope in log:
        history.add(envelope)
    return history


def place(log: list[Envelope], kind: type[Any], number: int) -> int:
    found = [index for index, one in enumerate(log) if isinstance(one.open(), kind) and one.open().round == number]
    return found[0]


def test_the_log_has_the_chain_and_each_manifest_once(stage: Any) -> None:
    for number in range(2):
        stage.play(number)
    log, spec = stage.log(), stage.cast.spec
    history = replayed(stage, log)
    roots = [bytes.fromhex(spec.checkpoint), bytes([50]) * 32, bytes([51]) * 32]
    assert [one.root for one in history.checkpoints] == roots
    assert [one.parent for one in history.checkpoints] == [None, *roots[:2]]
    assert log[0].open() == history.checkpoints[0]

    for number in range(2):
        without = list(log)
        del without[place(log, CheckpointManifest, number)]
        with pytest.raises(InvalidDataError, match="checkpoint"):
            replayed(stage, without)
    twice = [*log[:5], log[0], *log[5:]]
    with pytest.raises(InvalidDataError, match="a second checkpoint"):
        replayed(stage, twice)
    early = list(log)
    early.insert(place(log, CommitmentSet, 0), early.pop(place(log, CheckpointManifest, 1)))
    with pytest.raises(InvalidDataError, match="where none is due"):
        replayed(stage, early)


@pytest.mark.parametrize("change", ["parent", "root", "size_bytes", "layout"])
def test_a_manifest_that_does_not_follow_is_found(stage: Any, change: str) -> None:
    stage.play(0)
    log = stage.log()
    at = place(log, CheckpointManifest, 1)
    record = log[at].open()
    other = 17 if change == "size_bytes" else b"x" * 32
    forged = CheckpointManifest(**{**record.model_dump(), change: other})
    log[at] = Envelope.sign(Identity.load(stage.cast.home.coordinator_key), forged)
    with pytest.raises(InvalidDataError, match=f"leaf {at} of the log: the manifest of checkpoint 1 is not that of"):
        replayed(stage, log)


def test_it_is_signed_with_the_round_that_it_ends_and_before_the_next_plan(stage: Any) -> None:
    for number in range(2):
        stage.play(number)
    log = stage.log()
    assert place(log, RoundManifest, 0) < place(log, CheckpointManifest, 1) < place(log, RoundPlan, 1)
