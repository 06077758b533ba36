"""`coordinator.toml`: how a run is served. What defines the run itself is sealed in its spec, and is not here.

Every key may be overridden by an environment variable `SWARM_COORDINATOR_SECTION_KEY`; lists are separated by commas there.
A variable with this beginning that names no key is an error, and so is a value that is not allowed.
"""

from __future__ import annotations

import ipaddress
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from swarm_protocol.errors import ConfigurationError
from swarm_protocol.files import write_atomic
from swarm_protocol.spec import explain

PREFIX = "SWARM_COORDINATOR_"

Mode = Literal["open", "token", "invite", "allow-list"]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Server(_Section):
    host: str = Field(
        "127.0.0.1", min_length=1, description="the address to listen on; 0.0.0.0 for all of this machine's"
    )
    port: int = Field(8470, ge=0, le=65535, description="0 for any free one")
    tls_certificate: Path | None = Field(
        None, description="a PEM file with the chain; serves https together with tls_key"
    )
    tls_key: Path | None = Field(None, description="the certificate's private key, a PEM file")
    behind_proxy: tuple[str, ...] = Field(
        (), description="addresses or networks of proxies whose X-Forwarded-For and -Proto are believed"
    )
    workers: int = Field(1, ge=1, le=64, description="processes that serve the API; more than one takes PostgreSQL")

    @field_validator("behind_proxy", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return [item.strip() for item in value.split(",") if item.strip()] if isinstance(value, str) else value

    @field_validator("behind_proxy")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            try:
                ipaddress.ip_network(item)
            except ValueError as error:
                raise ValueError(f"takes IP addresses or networks of proxies: {error}") from error
        return value

    @model_validator(mode="after")
    def _certificate_and_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: give both, or neither")
        return self


class Database(_Section):
    url: str | None = Field(
        None,
        description="sqlite:///PATH or postgresql://USER:PASSWORD@HOST/NAME; left out: coordinator.db in this folder",
    )


class Objects(_Section):
    url: str | None = Field(None, description="s3://BUCKET/PREFIX or file:///PATH; left out: objects/ in this folder")
    keep: Literal["snapshots", "all"] = Field(
        "snapshots", description="which checkpoints are kept whole; what no kept one needs, and no audit, is deleted"
    )


class Admission(_Section):
    mode: Mode | None = Field(
        None, description="who may register; left out: token where the run has a token file, otherwise open"
    )


class Limits(_Section):
    """Requests per second that are served for long, and how many may come at once."""

    address_per_s: float = Field(200.0, gt=0.0, le=1e6, description="of one address; many nodes may share one")
    address_burst: float = Field(4000.0, ge=1.0, le=1e6)
    identity_per_s: float = Field(20.0, gt=0.0, le=1e6, description="of one identity, by the records that it signs")
    identity_burst: float = Field(1000.0, ge=1.0, le=1e6)


class Metrics(_Section):
    public: bool = Field(False, description="whether /metrics answers everybody, or this machine only")
    wandb_project: str | None = Field(
        None, min_length=1, description="a Weights & Biases project to write the curves to"
    )
    tensorboard_dir: Path | None = Field(None, description="a folder to write TensorBoard's event files to")


class Gossip(_Section):
    listen: str | None = Field(
        None,
        pattern=r"^/ip[46]/[0-9a-fA-F.:]+/tcp/[0-9]{1,5}$",
        description="where to gossip, such as /ip4/0.0.0.0/tcp/8471; left out: the coordinator does not gossip",
    )


class Log(_Section):
    format: Literal["text", "json"] = "text"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class CoordinatorConfig(_Section):
    """Everything in `coordinator.toml`; what is left out has a default."""

    server: Server = Server()
    database: Database = Database()
    objects: Objects = Objects()
    admission: Admission = Admission()
    limits: Limits = Limits()
    metrics: Metrics = Metrics()
    gossip: Gossip = Gossip()
    log: Log = Log()

    @model_validator(mode="after")
    def _several_workers_share_a_server(self) -> Self:
        if self.server.workers > 1 and not (self.database.url or "").startswith("postgresql"):
            raise ValueError("server.workers above 1 needs PostgreSQL: set database.url to postgresql://...")
        return self

    def changed(self, section: str, **changes: Any) -> CoordinatorConfig:
        """With other values in a section, checked; None stands for no change.

        Raises:
            ConfigurationError: a value is not allowed.
        """
        values = self.model_dump()
        values[section].update({key: value for key, value in changes.items() if value is not None})
        return _validated(values, "the coordinator's configuration")


def load(path: Path, environment: Mapping[str, str]) -> CoordinatorConfig:
    """The configuration in a file, which need not exist, under what the environment says.

    Raises:
        ConfigurationError: names every key that is wrong, what is allowed and what was found.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
    overridden = False
    for name, value in sorted(environment.items()):
        if name.startswith(PREFIX):
            section, key = _named_by(name)
            if not isinstance(values.setdefault(section, {}), dict):
                raise ConfigurationError(f"{path}: {section} is a section: write [{section}]")
            values[section][key] = value
            overridden = True
    return _validated(values, f"{path} with the environment's {PREFIX}*" if overridden else str(path))


def _named_by(variable: str) -> tuple[str, str]:
    section, _, key = variable.removeprefix(PREFIX).lower().partition("_")
    field = CoordinatorConfig.model_fields.get(section)
    known = [] if field is None else list(type(field.default).model_fields)
    if key in known:
        return section, key
    allowed = [f"{PREFIX}{section.upper()}_{name.upper()}" for name in known] or [
        f"{PREFIX}{name.upper()}_..." for name in CoordinatorConfig.model_fields
    ]
    raise ConfigurationError(f"the environment sets {variable}, which is no setting; there are {', '.join(allowed)}")


def _validated(values: Any, where: str) -> CoordinatorConfig:
    try:
        return CoordinatorConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(explain(error, where)) from error


def write(path: Path, config: CoordinatorConfig) -> None:
    """Write a configuration with every key explained; those that have their default are commented out. Mode 0600."""
    lines = [
        "# How this run is served. What is commented out has the value shown, or none. `serve` reads this file when it",
        f"# starts; its options and the environment's {PREFIX}SECTION_KEY come before it.",
    ]
    for section, field in CoordinatorConfig.model_fields.items():
        values = getattr(config, section)
        lines += ["", f"[{section}]"]
        for key, info in type(field.default).model_fields.items():
            value = getattr(values, key)
            note = f"  # {info.description}" if info.description else ""
            shown = '""' if value is None else _toml(value)
            lines.append(f"{'# ' if value == info.default else ''}{key} = {shown}{note}")
    write_atomic(path, ("\n".join(lines) + "\n").encode(), mode=0o600)


def _toml(value: Any) -> str:
    """A TOML value: JSON's strings, numbers, booleans and lists are TOML's too."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)
