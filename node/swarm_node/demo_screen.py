"""What the demo shows: live progress while it runs, and a table of what happened at the end."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

PHASES = {
    "assembling": "waiting for volunteers",
    "training": "training",
    "exchanging": "exchanging averages",
    "sealing": "sealing the checkpoint",
    "opening": "drawing the audits",
    "finished": "finished; the last audits are under way",
}


class Screen:
    """Live on a terminal; elsewhere one line per event."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._said: set[object] = set()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, sentence: str) -> None:
        if self._live is not None:
            self._live.update(Text(f"{sentence} …", style="dim"))
        else:
            self._console.print(f"{sentence} …")

    def update(self, status: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> None:
        """Show the run as the coordinator tells it, and the nodes as they do."""
        if not status:
            return
        if self._live is not None:
            self._live.update(_live_view(status, nodes))
            return
        for entry in status["evaluations"]:
            self._once(
                ("evaluation", entry["round"]), f"Checkpoint {entry['round']}: held-out loss {entry['loss']:.3f}"
            )
        for entry in status["rejected"]:
            line = f"Rejected: {entry['name']} in round {entry['round']}: {entry['reason']}"
            self._once(("rejected", entry["name"], entry["round"]), line)

    def _once(self, key: object, line: str) -> None:
        if key not in self._said:
            self._said.add(key)
            self._console.print(line, highlight=False, soft_wrap=True)


def _live_view(status: dict[str, Any], nodes: dict[str, dict[str, Any]]) -> RenderableType:
    shown = min(int(status["round"]) + 1, int(status["rounds"]))
    title = Text.assemble(
        (f"Round {shown} of {status['rounds']}", "bold"), f"  {PHASES.get(status['phase'], status['phase'])}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading in ("volunteer", "doing", "", "loss", "sent"):
        table.add_column(heading, min_width={"doing": 30, "": 20}.get(heading))
    ended = {node["name"] for node in status["nodes"] if node["standing"] != "good"}
    for name, node in nodes.items():
        steps = int(node.get("steps", 0))
        bar: RenderableType = ProgressBar(total=steps, completed=int(node.get("step", 0)), width=20) if steps else ""
        loss = node.get("loss")
        table.add_row(
            Text(name, style="red" if name in ended else ""),
            Text("rejected" if name in ended else str(node.get("state", "")), style="red" if name in ended else ""),
            "" if name in ended else bar,
            "" if loss is None else f"{loss:.3f}",
            size(int(node.get("bytes_sent", 0))),
        )
    losses = " → ".join(f"{entry['loss']:.3f}" for entry in status["evaluations"])
    audits = status["audits"]
    verdicts = f"{audits['accepted']} accepted, {audits['rejected']} rejected, {audits['pending']} under way"
    return Group(title, "", table, "", Text(f"Held-out loss  {losses or '…'}"), Text(f"Audits         {verdicts}"))


def show_result(console: Console, result: dict[str, Any]) -> None:
    """The table at the end, and in a sentence each what was checked."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
    for heading in ("checkpoint", "held-out loss", "change"):
        table.add_column(heading, justify="right")
    losses = result["val_loss"]
    for number, loss in enumerate(losses):
        change = "" if number == 0 else f"{loss - losses[number - 1]:+.3f}"
        table.add_row(str(number), f"{loss:.4f}", change)
    console.print(table)
    roots = result["checkpoint_roots"]
    agree = len(set(roots.values())) == 1
    audits, comparisons = result["audits"], result["comparisons"]
    console.print()
    if agree:
        root = next(iter(roots.values()))
        console.print(
            f"[green]✓[/] {len(roots)} processes hold the same checkpoint, {root[:16]}…",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"[red]✗[/] the checkpoints differ: {roots}", highlight=False, soft_wrap=True)
    console.print(
        f"{'[green]✓[/]' if not audits['inconclusive'] and not audits['unavailable'] else '[yellow]·[/]'} "
        f"{sum(audits.values())} of {result['contributions']} contributions replayed: {audits['accepted']} accepted "
        f"({comparisons['equal']} equal in every bit), {audits['rejected']} rejected, "
        f"{audits['inconclusive']} inconclusive, {audits['unavailable']} unavailable",
        highlight=False,
        soft_wrap=True,
    )
    averages = result["part_audits"]
    console.print(
        f"  {sum(averages.values())} averages made again: {averages['accepted']} accepted, {averages['rejected']} rejected, "
        f"{averages['inconclusive']} inconclusive, {averages['unavailable']} unavailable",
        highlight=False,
        soft_wrap=True,
    )
    for entry in result["rejected"]:
        console.print(
            f"  {entry['node']} in round {entry['round']}: {entry['reason']}", highlight=False, soft_wrap=True
        )
    sent = ", ".join(f"{name} {size(count)}" for name, count in result["bytes_sent"].items())
    console.print(f"  sent: {sent}; {result['wall_s']:.0f} s in all", highlight=False, soft_wrap=True)


def size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
