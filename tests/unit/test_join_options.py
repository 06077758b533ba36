"""What a donor types is what the node gets."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from swarm_node import joining
from swarm_node.cli import app


def test_name_team_and_token_reach_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[joining.Options] = []
    monkeypatch.setattr(joining, "join", asked.append)
    done = CliRunner().invoke(app, ["join", "http://x", "--name", "Zoë", "--team", "blue", "--token", "t"])
    assert done.exit_code == 0, done.output
    (options,) = asked
    assert (options.url, options.name, options.team, options.token) == ("http://x", "Zoë", "blue", "t")
    CliRunner().invoke(app, ["join", "http://x"])
    assert (asked[1].name, asked[1].team) == (None, "")


def test_limits_are_in_megabits_and_above_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[joining.Options] = []
    monkeypatch.setattr(joining, "join", asked.append)
    assert CliRunner().invoke(app, ["join", "x", "--upload-limit", "20", "--download-limit", "0.5"]).exit_code == 0
    assert (asked[0].upload_limit, asked[0].download_limit) == (20, 0.5)
    assert joining.MBIT * 8 == 1_000_000
    for option in ("--upload-limit", "--download-limit"):
        assert CliRunner().invoke(app, ["join", "x", option, "0"]).exit_code == 2
