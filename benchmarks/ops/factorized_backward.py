"""The gradients of factorized_conv2d on one CPU thread: our kernels beside ATen.

    python benchmarks/ops/factorized_backward.py --out docs/results

All five gradients of a pair, the map between the two computed again by both. CPU time of the
thread, the least of many calls. Which of the two runs, the row "backward" in
``pyeff/ops/tables/cpu.json``, comes from this table.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch

from pyeff.ops import _factorized_cpp as cpp
from pyeff.ops import _factorized_torch as aten
from pyeff.ops._factorized_choice import backward_backend
from pyeff.ops._factorized_pair import BackwardCall, taps_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from factorized_forms import FIRST_COLUMNS, SHAPES, Shape, first_cells, make_problem, measure
from timing import markdown_table, write_text

ALL = (True,) * 5
# ATen takes a hundred times as long for a large pair in float16.
DTYPES = {
    torch.float32: SHAPES,
    torch.bfloat16: SHAPES,
    torch.float64: SHAPES[4:6],
    torch.float16: SHAPES[4:6],
}


def times(shape: Shape, dtype: torch.dtype, vertical: bool, rounds: int) -> dict[str, float]:
    """Seconds of each backend."""
    x, first, second, bias, pair = make_problem(shape, dtype, vertical)
    size = (x.shape[0], second.shape[0], *pair.output_size(x.shape, taps_of(first)))
    grad = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
    call = BackwardCall(grad, x, first, bias, second, pair, ALL)
    calls = {"cpp": lambda: cpp.backward(call), "torch": lambda: aten.backward(call)}
    return measure(calls, rounds)


def main() -> None:
    """Writes FOLDER/factorized_backward_cpu.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the table")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, medians = [], []
    for dtype, shapes in DTYPES.items():
        ratios = []
        for shape in shapes:
            for vertical in (True, False):
                found = times(shape, dtype, vertical, options.rounds)
                ratios.append(found["torch"] / found["cpp"])
                milliseconds = [f"{1e3 * found[name]:.2f}" for name in ("cpp", "torch")]
                cells = [*first_cells(shape, dtype, vertical), *milliseconds, f"{ratios[-1]:.2f}"]
                rows.append(cells)
                print(*cells, flush=True)
        name = str(dtype).removeprefix("torch.")
        chosen = backward_backend(torch.empty(0, dtype=dtype))
        medians.append([name, f"{statistics.median(ratios):.2f}", chosen])
    page = (
        "# Gradients of factorized_conv2d\n\nMilliseconds on one thread for all gradients of a "
        "pair. Above 1, our kernels are faster than ATen.\n\n"
        + markdown_table(("dtype", "ATen / ours, median", "chosen"), medians)
        + "\n"
        + markdown_table((*FIRST_COLUMNS, "ours", "ATen", "ATen / ours"), rows)
    )
    write_text(options.out / "factorized_backward_cpu.md", page)


if __name__ == "__main__":
    main()
