"""How a run is served: a file, the environment before it, and clear words where a value is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from swarm_coordinator.config import CoordinatorConfig, load, write
from swarm_protocol.errors import ConfigurationError


def test_without_a_file_everything_has_a_default(tmp_path: Path) -> None:
    config = load(tmp_path / "coordinator.toml", {})
    assert config == CoordinatorConfig()
    assert (config.server.host, config.server.port, config.admission.mode) == ("127.0.0.1", 8470, None)


def test_a_written_file_explains_every_key_and_reads_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    config = load(path, {"SWARM_COORDINATOR_ADMISSION_MODE": "invite", "SWARM_COORDINATOR_SERVER_PORT": "9000"})
    write(path, config)
    assert load(path, {}) == config
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_text()
    assert "\nport = 9000" in text
    assert '\n# host = "127.0.0.1"' in text
    for section in CoordinatorConfig.model_fields:
        for key in type(getattr(config, section)).model_fields:
            assert f"{key} = " in text


def test_the_file_uncommented_is_valid_but_for_what_has_no_value(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    write(path, CoordinatorConfig())
    lines = [line.removeprefix("# ") for line in path.read_text().splitlines()[2:]]
    path.write_text("\n".join(line for line in lines if ' = ""' not in line))
    assert load(path, {}) == CoordinatorConfig()


def test_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text('[server]\nport = 1\nhost = "::1"\n')
    environment = {
        "SWARM_COORDINATOR_SERVER_PORT": "2",
        "SWARM_COORDINATOR_SERVER_BEHIND_PROXY": "10.0.0.1, 10.1.0.0/16",
    }
    server = load(path, environment).server
    assert (server.host, server.port, server.behind_proxy) == ("::1", 2, ("10.0.0.1", "10.1.0.0/16"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[server]\nport = 70000", "server.port: Input should be less than or equal to 65535 (found 70000)"),
        ('[admission]\nmode = "closed"', "'open', 'token', 'invite' or 'allow-list' (found 'closed')"),
        ('[server]\nbehind_proxy = ["proxy"]', "server.behind_proxy: Value error, takes IP addresses"),
        ('[server]\ntls_key = "key.pem"', "belong together"),
        ("[server]\nworkers = 2", "needs PostgreSQL"),
        ("[serve]\nport = 1", "serve: Extra inputs are not permitted"),
        ("port = ", "is not TOML"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "coordinator.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        load(path, {})
    assert said in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["SWARM_COORDINATOR_SERVER_PROT", "SWARM_COORDINATOR_PORT"])
def test_a_variable_that_names_no_key_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}, which is no setting"):
        load(tmp_path / "coordinator.toml", {name: "1"})


def test_an_option_is_checked_like_the_file(tmp_path: Path) -> None:
    config = load(tmp_path / "coordinator.toml", {})
    assert config.changed("server", port=1, host=None).server.port == 1
    with pytest.raises(ConfigurationError, match=r"server\.port"):
        config.changed("server", port=-1)
