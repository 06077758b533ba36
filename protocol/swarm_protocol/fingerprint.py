"""What the bits of a training run depend on besides the inputs. Equal fingerprints promise equal bits.

A replay under another fingerprint is compared within a tolerance instead (`replay`).
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from blake3 import blake3

from swarm_protocol import encoding

_VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "KMP_DETERMINISTIC_REDUCTION",
    "MKL_CBWR",
    "MKL_DEBUG_CPU_TYPE",
    "MKL_ENABLE_INSTRUCTIONS",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables that choose among kernels which round differently."""


def runtime_fingerprint(device: str, threads: int) -> dict[str, str | int]:
    """The runtime of this process for training on `device` with `threads` threads; asked after `training.configure`."""
    found: dict[str, str | int] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "system": platform.system(),
        "device": torch.device(device).type,
        "threads": threads,
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": int(torch.backends.mkl.is_available()),  # type: ignore[no-untyped-call]
        "onednn": int(torch.backends.mkldnn.is_available()),  # type: ignore[no-untyped-call]
    }
    if torch.device(device).type == "cuda":
        found["device_name"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver_version()
    found |= {f"env.{name}": os.environ[name] for name in _VARIABLES if name in os.environ}
    return found


def fingerprint_hash(fingerprint: Mapping[str, str | int]) -> bytes:
    """32 bytes that name a runtime in commitments and verdicts."""
    return blake3(encoding.encode(fingerprint), derive_key_context="swarm-node 2026 runtime fingerprint").digest()


def _cpu_model() -> str:
    """Family, model and stepping where Linux tells them: kernels are chosen by these rather than by the brand name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    first: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        first.setdefault(name.strip(), value.strip())
    wanted = ("vendor_id", "model name", "cpu family", "model", "stepping")
    return ", ".join(first[name] for name in wanted if name in first) or platform.machine()


def _driver_version() -> str:
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"
