"""Who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import swarm_coordinator
import swarm_node
import swarm_protocol

PACKAGES = {package.__name__: Path(package.__path__[0]) for package in (swarm_protocol, swarm_node, swarm_coordinator)}
ALLOWED = {
    "swarm_protocol": {"swarm_protocol"},
    "swarm_node": {"swarm_protocol", "swarm_node"},
    "swarm_coordinator": {"swarm_protocol", "swarm_coordinator"},
}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, also inside functions, and by name with `import_module` or `__import__`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_imports_only_those_below_it(name: str) -> None:
    files = sorted(PACKAGES[name].rglob("*.py"))
    assert files
    ours = {
        (str(path.relative_to(PACKAGES[name])), module)
        for path in files
        for module in imported(path)
        if module.split(".")[0].startswith("swarm_")
    }
    wrong = {(path, module) for path, module in ours if module.split(".")[0] not in ALLOWED[name]}
    assert not wrong


def test_hivemind_and_libp2p_never_meet_in_one_package_module() -> None:
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            roots = {module.split(".")[0] for module in imported(path)}
            assert not {"hivemind", "libp2p"} <= roots, f"{path}: the two cannot be loaded into one process"


def test_nobody_reads_or_writes_pickles() -> None:
    for package in PACKAGES.values():
        for path in package.rglob("*.py"):
            assert not {"pickle", "dill", "cloudpickle", "marshal", "shelve"} & set(imported(path)), path
