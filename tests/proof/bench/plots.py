"""The result as pictures: what `docs/speed.md` shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["draw"]

_OURS, _OTHERS = "#1f6f8b", "#b9c4c9"


def draw(document: dict[str, Any], folder: Path) -> None:
    """Write `peers.png`, `backlog.png` and `latency.png`, each as far as it was measured."""
    bars = {"relay-peers": ("Relay: rows a second from PostgreSQL to Valkey", "peers.png"),
            "queue-peers": ("One worker process: effects a second", "queues.png")}  # fmt: skip
    for section, (title, name) in bars.items():
        if entries := document["plots"].get(section):
            _bars(entries, title, folder / name)
    if points := document["plots"].get("backlog"):
        _backlog(points, folder / "backlog.png")
    if curves := document["plots"].get("latency"):
        _latency(curves, folder / "latency.png")


def _bars(entries: dict[str, float], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(entries) + 1))
    names = list(entries)[::-1]
    drawn = axes.barh(names, [entries[name] for name in names],
                      color=[_OURS if name.startswith("this") else _OTHERS for name in names])  # fmt: skip
    axes.bar_label(drawn, labels=[f"{entries[name]:,.0f}" for name in names], padding=4)
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    _save(figure, path)


def _backlog(points: dict[str, float], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 3))
    lengths = [int(each) for each in points]
    axes.semilogx(lengths, list(points.values()), "o-", color=_OURS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("rows that wait when the relay begins")
    axes.set_title("Relay: rows a second against the backlog", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _latency(curves: dict[str, dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 3))
    width = 0.8 / len(curves)
    percentiles = list(next(iter(curves.values())))
    for number, (name, values) in enumerate(curves.items()):
        places = [index + number * width for index in range(len(percentiles))]
        axes.bar(places, [values[each] for each in percentiles], width, label=name)
    axes.set_xticks([index + 0.4 - width / 2 for index in range(len(percentiles))], percentiles)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_title("From commit to the start of the consumer, idle", loc="left")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
