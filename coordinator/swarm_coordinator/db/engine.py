"""Opening the database: SQLite by default, PostgreSQL by URL, brought up to date by its migrations."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import create_engine, event, inspect
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from swarm_protocol.errors import ConfigurationError

BUSY_TIMEOUT_MS = 10_000
CONNECT_TIMEOUT_S = 10
FIRST_REVISION = "0001"
MIGRATION_LOCK = 0x5357_4152_4D00


def open_database(url: str) -> Engine:
    """Open a database whose commits survive a crash of the machine; one that is new or old is brought up to date.

    Args:
        url: `sqlite:///PATH` or `postgresql://USER:PASSWORD@HOST/NAME`.

    Raises:
        ConfigurationError: it cannot be opened, or was written by a newer version.
    """
    engine = _engine(url)
    try:
        with engine.begin() as connection:
            _migrate(connection)
    except DBAPIError as error:
        engine.dispose()
        raise ConfigurationError(f"the database {shown(url)} cannot be opened: {error.orig}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def shown(url: str) -> str:
    """The URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_MS / 1000})
            event.listen(engine, "connect", _configure_sqlite)
            # The driver would begin a transaction at the first write only; a reader's statements have to agree as well.
            event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
            return engine
        if parsed.get_backend_name() == "postgresql":
            # A reader's statements have to agree with each other here as well, hence the isolation level.
            return create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                connect_args={"connect_timeout": CONNECT_TIMEOUT_S},
                isolation_level="REPEATABLE READ",
                pool_size=10,
                max_overflow=10,
                pool_pre_ping=True,
            )
    except ArgumentError as error:
        raise ConfigurationError(f"the database's URL is none: {error}") from error
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise ConfigurationError(
            "PostgreSQL needs its driver; run: pip install 'swarm-node[coordinator,postgres]'"
        ) from error
    raise ConfigurationError(f"{shown(url)} is neither sqlite:///PATH nor postgresql://...")


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(files("swarm_coordinator.db") / "migrations"))
    config.attributes["connection"] = connection
    if connection.dialect.name == "postgresql":
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})")
    scripts = ScriptDirectory.from_config(config)
    found = MigrationContext.configure(connection).get_current_revision()
    known = {script.revision for script in scripts.walk_revisions()}
    if found is not None and found not in known:
        raise ConfigurationError(
            f"the database was written by a newer version (schema {found}); run: pip install --upgrade swarm-node"
        )
    if found == scripts.get_current_head():
        return
    if found is None and inspect(connection).has_table("runs"):
        command.stamp(config, FIRST_REVISION)  # from before there were migrations
    command.upgrade(config, "head")


def _configure_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.close()
