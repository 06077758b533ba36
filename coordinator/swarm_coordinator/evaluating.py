"""Held-out loss of sealed checkpoints, and now and then what the model writes: a process of its own, at low priority.

The checkpoint worker hands it checkpoints by their roots (`Evaluator`), which it reads from the object store, so that
nothing that it does delays the sealing of a round. Its numbers are in the tolerant domain. A sample is drawn with a seed,
from a prompt that is the same for all checkpoints of a run: on one machine a checkpoint always writes the same.

python -m swarm_coordinator.evaluating DIRECTORY: one request per line on stdin, one answer per line on stdout, both JSON.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np

from swarm_coordinator.run_directory import RunDirectory
from swarm_coordinator.store import Store
from swarm_protocol import adapters, data, sampling, training
from swarm_protocol.checkpoint import Checkpoint
from swarm_protocol.chunks import StateManifest, manifest_of
from swarm_protocol.data import Dataset, DatasetManifest
from swarm_protocol.errors import ConfigurationError, HashMismatchError, SwarmError
from swarm_protocol.model import llama
from swarm_protocol.processes import bound_to_parent
from swarm_protocol.records import MAX_SAMPLE_CHARACTERS
from swarm_protocol.spec import RunSpec
from swarm_protocol.tokenizing import Tokenizer, harmless
from swarm_protocol.training import Float32

SAMPLE_EVERY = int(os.environ.get("SWARM_SAMPLE_EVERY", "10"))
"""Rounds between samples; 0 for none. The last checkpoint always has one, unless there are none."""

PROMPT_TOKENS = 64
SAMPLE_TOKENS = 192
TEMPERATURE = 0.8
MARK = " ‖ "
"""Between the prompt and what the model writes."""

EVALUATION_S = 3600.0
MAX_LINE_BYTES = 1 << 16
NICENESS = 10

Decode = Callable[[Sequence[int]], str]


class EvaluationError(SwarmError):
    """A checkpoint could not be evaluated; the run goes on without its number."""


@dataclass(frozen=True)
class Measured:
    """Nats per token over `tokens` held-out tokens; `sample` is None where none was wanted, or none can be made."""

    loss: float
    tokens: int
    sample: str | None


def wants_sample(round_number: int, rounds: int, every: int = SAMPLE_EVERY) -> bool:
    """Whether the checkpoint that a round starts from gets a sample; `rounds` is the number of the last checkpoint."""
    return every > 0 and (round_number % every == 0 or round_number == rounds)


class Evaluator:
    """The process, started at the first checkpoint and again after it failed. One caller at a time."""

    def __init__(self, directory: Path) -> None:
        self._command = [sys.executable, "-m", "swarm_coordinator.evaluating", str(directory)]
        self._process: asyncio.subprocess.Process | None = None

    async def measure(self, root: bytes, *, sample: bool) -> Measured:
        """Evaluate a checkpoint that is in the object store.

        Raises:
            EvaluationError: it is not there or damaged, or the process failed or took too long.
        """
        request = json.dumps({"root": root.hex(), "sample": sample}) + "\n"
        try:
            async with asyncio.timeout(EVALUATION_S):
                process = await self._running()
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write(request.encode())
                await process.stdin.drain()
                line = await process.stdout.readline()
            answer = json.loads(line)
        except (OSError, ValueError, TimeoutError) as error:
            await self.close()
            raise EvaluationError(f"the evaluating process gave no answer ({error})") from error
        except BaseException:
            await self.close()
            raise
        if "error" in answer:
            raise EvaluationError(str(answer["error"]))
        return Measured(**answer)

    async def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def _running(self) -> asyncio.subprocess.Process:
        if self._process is None or self._process.returncode is not None:
            pipe = asyncio.subprocess.PIPE
            command = bound_to_parent(self._command)
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, limit=MAX_LINE_BYTES
            )
        return self._process


class Bench:
    """What the process measures on: one run's held-out data."""

    def __init__(self, spec: RunSpec, store: Store) -> None:
        self._spec = spec
        self._store = store
        manifest = DatasetManifest.decode(self._blob(bytes.fromhex(spec.data.root)))
        self._batches = list(data.held_out_batches(spec, Dataset(manifest, self._blob)))

    def measure(self, root: bytes, *, sample: bool) -> Measured:
        """Raises `SwarmError` if the checkpoint is not in the store, or is not what its root says."""
        parameters = self._checkpoint(root).parameters
        tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in self._batches)
        loss = training.evaluate(self._spec, parameters, self._batches, self._trunk)
        return Measured(loss, tokens, self._sample(parameters) if sample else None)

    def _sample(self, parameters: Float32) -> str | None:
        if self._decode is None:
            return None
        window = self._batches[0][0]
        prompt = [int(token) for token in window[: min(PROMPT_TOKENS, len(window) // 2)]]
        full = adapters.full_parameters(self._spec, parameters, self._trunk)
        written = continuation(self._spec, full, prompt, SAMPLE_TOKENS)
        return printable(self._decode(prompt) + MARK + self._decode(written))

    @cached_property
    def _decode(self) -> Decode | None:
        return decoder(self._spec.data.tokenizer, self._store)

    @cached_property
    def _trunk(self) -> Float32 | None:
        if self._spec.trunk is None:
            return None
        data = self._state(bytes.fromhex(self._spec.trunk), 4 * self._spec.model.num_parameters)
        if manifest_of(data).root.hex() != self._spec.trunk:
            raise HashMismatchError("the trunk in the object store is damaged; restore it from a backup")
        return np.frombuffer(data, "<f4")

    def _checkpoint(self, root: bytes) -> Checkpoint:
        return Checkpoint.from_bytes(self._spec, 0, self._state(root, 8 * self._spec.num_trainable), root)

    def _state(self, root: bytes, size_bytes: int) -> bytes:
        raw = self._store.get_checkpoint(root)
        if raw is None:
            raise ConfigurationError(f"checkpoint {root.hex()} is not in the object store; restore it from a backup")
        manifest = StateManifest.decode(raw, max_size_bytes=size_bytes)
        return b"".join(map(self._blob, manifest.hashes))

    def _blob(self, digest: bytes) -> bytes:
        found = self._store.get(digest)
        if found is None:
            raise ConfigurationError(f"the blob {digest.hex()} is not in the object store; restore it from a backup")
        return found


def continuation(spec: RunSpec, parameters: Float32, prompt: Sequence[int], count: int) -> list[int]:
    """`count` tokens after a prompt of at least one, each drawn at `TEMPERATURE` from the distribution of the full model."""
    model = llama.build(spec.model)
    llama.load_flat(model, parameters)
    return list(islice(sampling.continuation(model, prompt, sampling.Draw(TEMPERATURE, seed=spec.seed)), count))


def decoder(tokenizer: str, store: Store) -> Decode | None:
    """From tokens to text; None where the tokenizer's file or the package for it is not here.

    Args:
        tokenizer: `bytes`, or the hash of a tokenizer.json.
    """
    blob = None if tokenizer == "bytes" else store.get(bytes.fromhex(tokenizer))
    if tokenizer != "bytes" and (blob is None or importlib.util.find_spec("tokenizers") is None):
        return None
    return Tokenizer(blob).decode


def printable(text: str) -> str:
    """The text as it may be stored and shown: no control characters but line ends and tabs, and not too long."""
    return harmless(text)[:MAX_SAMPLE_CHARACTERS]


def main() -> None:
    """Answer requests until stdin ends."""
    os.nice(NICENESS)
    training.configure(1)
    home = RunDirectory(Path(sys.argv[1]))
    bench: Bench | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            bench = bench or Bench(home.spec(), Store(home.objects_url()))
            answer = asdict(bench.measure(bytes.fromhex(request["root"]), sample=request["sample"]))
        except SwarmError as error:
            answer = {"error": str(error)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
