"""Tables and plots of what compare.py measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

BEGIN = re.compile(r"<!-- benchmarks: begin.*?-->\n")
END = "<!-- benchmarks: end -->"


def heading(results: dict[str, Any]) -> str:
    """Where the numbers come from, in one paragraph."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    quick = " A quick run: a check of the program, not a result." if results["quick"] else ""
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['instruction set']}; {versions}; "
        f"{machine['date']}, load average {machine['load'][0]} at the start. float32, closed loop, minimum "
        f"of several interleaved runs. `python benches/compare.py`.{quick}"
    )


def targets_table(results: dict[str, Any]) -> str:
    lines = ["| | figure | measured | target | | |", "| --- | --- | ---: | ---: | --- | --- |"]
    for figure in results["figures"]:
        value, target, least = figure["value"], figure["target"], figure["least"]
        bound = (
            "" if target is None else f"{'at least' if figure['more_is_better'] else 'at most'} {target:g}"
        )
        if least is not None:
            bound += f" ({least:g})"
        measured = "-" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"
        # Targets are for the sizes of a whole run.
        met = "" if results["quick"] else verdict(figure)
        cells = (figure["id"], figure["what"], measured, bound, met, figure["note"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(figure: dict[str, Any]) -> str:
    value, target, least = figure["value"], figure["target"], figure["least"]
    if value is None or target is None:
        return ""
    sign = -1 if figure["more_is_better"] else 1
    if sign * value <= sign * target:
        return "met"
    if least is not None and sign * value <= sign * least:
        return "acceptable"
    return "**missed**"


NAMES = {
    "auto": "**auto**",
    "continuous": "continuous (Algorithm 2)",
    "epoched": "epoched (Algorithm 1)",
    "direct": "fused direct sum",
    "torch cached dot": "torch, direct sum",
    "public FutureFill": "public FutureFill (torch)",
    "fft-convolver": "crate `fft-convolver`",
    "FFTConvolver (C++)": "FFTConvolver (C++)",
    "offline-fft": "torch FFT, input known in advance",
    "scipy oaconvolve": "scipy `oaconvolve`, input known in advance",
}


def methods_table(results: dict[str, Any]) -> str:
    rows = results.get("methods", [])
    if not rows:
        return ""
    lengths = sorted({row["log_length"] for row in rows})
    values = {(row["method"], row["log_length"]): row["ns"] for row in rows}
    lines = [
        f"Nanoseconds per position and channel, {rows[0]['channels']} channels, one thread:",
        "",
        "| | " + " | ".join(f"T = {2**length}" for length in lengths) + " |",
        "| --- |" + " ---: |" * len(lengths),
    ]
    for method, name in NAMES.items():
        cells = [values.get((method, length)) for length in lengths]
        if any(cell is not None for cell in cells):
            shown = [
                "-" if cell is None else f"{cell:.1f}" if cell < 100 else f"{cell:.0f}" for cell in cells
            ]
            lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def fill(page: Path, text: str) -> None:
    """Put text between the markers of a page."""
    content = page.read_text(encoding="utf-8")
    begin = BEGIN.search(content)
    if begin is None or END not in content:
        raise SystemExit(f"{page}: expected the markers <!-- benchmarks: begin --> and {END}")
    tail = content[content.index(END) :]
    page.write_text(content[: begin.end()] + "\n" + text + "\n\n" + tail, encoding="utf-8")


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=120)
        plt.close(figure)
        written.append(folder / name)

    if rows := results.get("methods"):
        figure, axes = plt.subplots(figsize=(9, 5))
        for method, name in NAMES.items():
            points = [
                (r["log_length"], r["ns"]) for r in rows if r["method"] == method and r["ns"] is not None
            ]
            if points:
                x = [2**length for length, _ in points]
                y = [value * 2**length / 1e9 for length, value in points]
                style = "--" if "known in advance" in name else "-"
                axes.loglog(x, y, style, marker="o", markersize=3, label=name.strip("*").replace("`", ""))
        axes.set(
            xlabel="positions T", ylabel="seconds per channel", title="Total time, 256 channels, one thread"
        )
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.grid(alpha=0.3)
        save(figure, "time.png")
    if latency := results.get("latency"):
        figure, axes = plt.subplots(figsize=(7, 4))
        for name, counts in latency["counts"].items():
            axes.stairs(counts, [edge / 1e3 for edge in latency["edges_ns"]], label=name)
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="microseconds",
            ylabel="steps",
            title=f"Single steps, {latency['channels']} channels, {latency['length']} positions",
        )
        axes.legend(fontsize=8)
        save(figure, "latency.png")
    if sizes := results.get("bytes"):
        figure, axes = plt.subplots(figsize=(7, 4))
        for method in dict.fromkeys(row["method"] for row in sizes):
            points = [(2 ** row["log_length"], row["bytes"]) for row in sizes if row["method"] == method]
            axes.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=method)
        axes.set(xlabel="positions T", ylabel="bytes of state per channel", title="Memory")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
        save(figure, "memory.png")
    return written
