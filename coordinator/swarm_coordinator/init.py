"""Making a run: from a config and a corpus to a directory that can be served.

The directory appears whole or not at all. What defines the run is sealed in `spec.cbor`, whose hash is the run id; the keys
and the beacon's seed stay with the run owner.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from swarm_coordinator import config as configuration
from swarm_coordinator.config import CoordinatorConfig
from swarm_coordinator.origins import Origin
from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import ancestry
from swarm_protocol.ancestry import Ancestor
from swarm_protocol.chunks import content_hash
from swarm_protocol.draw import chain_end
from swarm_protocol.errors import ConfigurationError, InvalidDataError
from swarm_protocol.files import write_atomic
from swarm_protocol.identity import Identity
from swarm_protocol.layout import layout
from swarm_protocol.parts import suggested_parts
from swarm_protocol.spec import AuditSpec, DataSpec, ExchangeSpec, RunConfig, RunSpec
from swarm_protocol.tolerances import Tolerances


@dataclass(frozen=True)
class Options:
    """`corpus` is files and folders; `auditors` is how many keys are made that may audit; `tolerances` a tolerance file.

    `token` is what volunteers have to know to join; `serving` is written to `coordinator.toml`; `origin` is the model that
    the run starts from, instead of random weights.
    """

    directory: Path
    config: RunConfig
    corpus: Sequence[Path]
    token: str | None = None
    auditors: int = 2
    tolerances: Path | None = None
    serving: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    origin: Origin | None = None


def initialise(options: Options) -> RunSpec:
    """Make the directory of a new run.

    Raises:
        ConfigurationError: the directory is in use, the config does not fit the origin, the corpus is too small, the
            tolerances are for another model, or the disk is full.
    """
    target = options.directory.absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigurationError(f"{options.directory} exists and is not empty; choose another directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise ConfigurationError(f"{target.parent} cannot be written: {error.strerror}") from error
    try:
        with tempfile.TemporaryDirectory(prefix="swarm-init-") as scratch:
            if options.origin is not None:
                options = replace(options, config=options.origin.fit(options.config, Path(scratch)))
            spec = _build(RunDirectory(building), options)
        os.sync()
        building.rename(target)
    except OSError as error:
        raise ConfigurationError(f"{options.directory} cannot be made: {error.strerror}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return spec


def _build(directory: RunDirectory, options: Options) -> RunSpec:
    # Torch takes seconds to load, and nothing else of the coordinator needs it.
    from swarm_protocol import adapters
    from swarm_protocol.checkpoint import Checkpoint
    from swarm_protocol.corpus import write_dataset

    config = options.config
    configuration.write(directory.config_file, options.serving)
    store = Store(directory.objects_url())
    audit = _with_tolerances(config, options.tolerances, store)
    dataset = write_dataset(config.data, config.model, options.corpus, lambda blob: store.put(content_hash(blob), blob))
    store.put(dataset.root, dataset.encode())
    base = base_parameters(config, options)
    trunk = None if config.trainable.kind == "all" else store.put_state(base).root.hex()
    checkpoint = Checkpoint.initial(adapters.initial(config.model, config.trainable, config.seed, base))
    root = store.put_state(*checkpoint.buffers).root
    identity, seed = Identity.generate(), secrets.token_bytes(32)
    identity.save(directory.coordinator_key)
    Identity.generate().save(directory.worker_key)
    for number in range(options.auditors):
        Identity.generate().save(directory.auditor_key(number))
    write_atomic(directory.beacon_seed_file, seed, mode=0o600)
    if options.token is not None:
        write_atomic(directory.token_file, options.token.encode(), mode=0o600)
    spec = RunSpec(
        name=config.name,
        seed=config.seed,
        numerics=config.numerics,
        coordinator=identity.public_key.hex(),
        checkpoint=root.hex(),
        beacon=chain_end(seed, config.rounds.count).hex(),
        trunk=trunk,
        parent=None if options.origin is None else options.origin.parent,
        model=config.model,
        trainable=config.trainable,
        data=DataSpec(
            root=dataset.root.hex(),
            tokenizer=dataset.tokenizer,
            train_tokens=dataset.train_tokens,
            held_out_windows=config.data.held_out_windows,
        ),
        training=config.training,
        exchange=_with_parts(config),
        outer=config.outer,
        rounds=config.rounds,
        audit=audit,
    )
    document = layout(spec)
    store.put(content_hash(document), document)
    store.claim(spec.run_id)
    write_atomic(directory.spec_file, spec.encode())
    if spec.parent is not None and options.origin is not None:
        _keep_ancestors(directory, store, options.origin.ancestors)
    return spec


def base_parameters(config: RunConfig, options: Options) -> npt.NDArray[np.float32]:
    """All parameters of the model that the run begins with, trained or not: float32[num_parameters]."""
    from swarm_protocol.model.llama import initial_parameters

    if options.origin is not None:
        return options.origin.parameters
    return initial_parameters(config.model, config.seed)


def _keep_ancestors(directory: RunDirectory, store: Store, ancestors: Sequence[Ancestor]) -> None:
    """Have the specs of the runs that this one comes from where they are served."""
    write_atomic(directory.ancestors_file, ancestry.encode(ancestors))
    for ancestor in ancestors:
        store.put(content_hash(ancestor.spec), ancestor.spec)


def _with_parts(config: RunConfig) -> ExchangeSpec:
    """The exchange's settings; if they do not say how many parts, as many as suit what is trained."""
    exchange = config.exchange
    if "parts" in exchange.model_fields_set:
        return exchange
    trained = config.model.num_trainable(config.trainable)
    return exchange.model_copy(update={"parts": suggested_parts(trained, exchange.codec)})


def _with_tolerances(config: RunConfig, path: Path | None, store: Store) -> AuditSpec:
    """The audit policy, with the tolerance file that it seals in the store."""
    if path is None:
        if config.audit.tolerance_file is not None:
            raise ConfigurationError(
                "audit.tolerance_file names a tolerance file: give it as well, with --tolerances FILE"
            )
        return config.audit
    if config.numerics == "exact":
        raise ConfigurationError(
            'exact runs compare hashes and have no tolerances; leave --tolerances out, or set numerics = "native"'
        )
    try:
        data = path.read_bytes()
        Tolerances.decode(data).require_fit(config.model, config.training, config.trainable)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except InvalidDataError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    digest = content_hash(data)
    if config.audit.tolerance_file not in (None, digest.hex()):
        raise ConfigurationError(f"audit.tolerance_file names another file than {path}; correct it, or leave it out")
    store.put(digest, data)
    return config.audit.model_copy(update={"tolerance_file": digest.hex()})
