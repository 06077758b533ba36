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
