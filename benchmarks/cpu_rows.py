"""What the CPU benchmarks of operators share: the peak, the columns of a row, its cells, the loop.

A row is one case: what was asked, pyeff's time, its distance to the multiply-add peak measured in
the same rounds, and the time of every other way over pyeff's.
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from timing import (
    Candidate,
    Comparison,
    machine_line,
    prefer_this_process,
    write_json,
    write_text,
)

from pyeff import _C

OURS = "pyeff"
PEAK = "fma loop"
# Long enough that waking a second thread does not count.
_PEAK_REPEATS = 400_000

Row = dict[str, Any]


def peak(threads: int) -> Candidate:
    """The floor of this moment: multiply-adds in float32 that touch no memory."""
    return lambda: _C.run_fma_loop(_PEAK_REPEATS, threads)


def peak_gflops(result: Comparison, threads: int) -> float:
    """GFLOP / s of :func:`peak`, which was the candidate ``PEAK``."""
    return float(_C.run_fma_loop(_PEAK_REPEATS, threads) / result.time(PEAK).median / 1e9)


def measured(result: Comparison, baselines: Sequence[str], flop: float, peak: float) -> Row:
    """The columns that were measured.

    Args:
        result: Times of ``OURS``, the baselines and others.
        baselines: Of which the strongest is named.
        flop: Of one call.
        peak: GFLOP / s.
    """
    ours = result.time(OURS)
    strongest = result.strongest(baselines)
    over = result.speedup(OURS, strongest)
    row: Row = {
        "ms": ours.median * 1e3,
        "ms_p10": ours.p10 * 1e3,
        "ms_p90": ours.p90 * 1e3,
        "gflops": flop / ours.median / 1e9,
        "over_floor": ours.median / (flop / peak / 1e9),
        "strongest": strongest,
        "over_strongest": over.median,
        "over_strongest_p10": over.p10,
        "over_strongest_p90": over.p90,
        "clean": result.clean,
        "rounds": len(result.seconds[OURS]),
    }
    for name in result.seconds:
        if name not in (OURS, PEAK):
            row[f"over {name}"] = result.speedup(OURS, name).median
    return row


def show(row: Row, peak: float) -> str:
    """One line of progress."""
    ratios = "  ".join(f"{k[5:]} {v:.2f}x" for k, v in row.items() if k.startswith("over "))
    note = "" if row["clean"] else "  (disturbed)"
    speed = f"{row['gflops']:6.1f} GF/s of {peak:.0f}"
    return f"{row['ms']:9.4f} ms  {speed}  {ratios}{note}"


def speed_cells(row: Row, peak: float) -> list[str]:
    """Under ms, GF/s, peak and x floor."""
    return [f"{row['ms']:.4g}", f"{row['gflops']:.0f}", f"{peak:.0f}", f"{row['over_floor']:.2f}"]


def last_cells(row: Row) -> list[str]:
    """Under "over the strongest" and "disturbed"."""
    low, high = row["over_strongest_p10"], row["over_strongest_p90"]
    return [f"{row['over_strongest']:.2f} [{low:.2f}..{high:.2f}]", "" if row["clean"] else "yes"]


def output_options(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds --out, --json and --markdown."""
    parser.add_argument("--out", type=Path, help=f"folder for {name}.json and {name}.md")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--markdown", type=Path, help="file for the tables")


def write_rows(
    rows: list[Row], name: str, options: argparse.Namespace, markdown: Callable[[list[Row]], str]
) -> None:
    """The rows in every form and place that was asked for."""
    out: Path | None = options.out
    for path in (options.json, out and out / f"{name}.json"):
        if path:
            write_json(path, rows)
    for path in (options.markdown, out and out / f"{name}.md"):
        if path:
            write_text(path, markdown(rows))


def run_cases(
    cases: Iterable[Any],
    measure: Callable[[Any], Row],
    show: Callable[[Row], str],
    write: Callable[[list[Row]], None],
) -> None:
    """Measures case by case; what was measured stays if a later one is interrupted."""
    prefer_this_process()
    print(machine_line())
    rows: list[Row] = []
    for case in cases:
        rows.append(measure(case))
        print(case.title(), show(rows[-1]), flush=True)
        write(rows)
