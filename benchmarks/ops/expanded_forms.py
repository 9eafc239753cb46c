"""The table by which ``form="auto"`` chooses, from the benchmark's rows.

    python benchmarks/ops/bench_expanded_conv2d.py --out DIR
    python benchmarks/ops/expanded_forms.py DIR/bench_expanded_conv2d_cpu.json [--threads 1]

Fits the seconds of each kind of work (``pyeff.nn.expansion_cost.Work``) to the times of both forms,
all errors relative, none below 0, and prints them as ``pyeff/ops/tables/cpu.json`` has them; then
which form is faster in each row, which one the fit calls faster and how much a wrong call costs.
Matrix products are measured here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_expanded_conv2d import FORMS, Case, step
from timing import compare

from pyeff.nn import ExpandedLinear
from pyeff.nn.contraction import Kernel
from pyeff.nn.expansion_cost import Forms, Work, conv_forms, linear_forms

LINEARS = ((512, 64, 128), (512, 64, 1), (128, 64, 128), (128, 64, 8), (64, 512, 32))
Measured = list[tuple[str, Forms, dict[str, float]]]


def conv_rows(rows: list[dict[str, Any]], threads: int) -> Measured:
    """Title, work and seconds of both forms of the training rows."""
    fields = Case.__dataclass_fields__
    found: Measured = []
    for row in rows:
        if row["part"] == "train" and row["threads"] == threads:
            case = Case(**{name: row[name] for name in fields})
            edge = case.kernel // 2
            kernels = [Kernel.of(member) for member in case.layer("auto").convs]
            forms = conv_forms(kernels, case.image(), (edge, edge, edge, edge))
            found.append((case.title(), forms, {f: row[f"ms {f}"] / 1e3 for f in FORMS}))
    return found


def linear_rows(threads: int) -> Measured:
    """The same of linear layers, timed now."""
    torch.set_num_threads(threads)
    found: Measured = []
    for inputs, outputs, batch in LINEARS:
        x = torch.randn(batch, inputs)
        layers = {form: ExpandedLinear(inputs, outputs, form=form) for form in FORMS}
        calls = {form: step(layer, x) for form, layer in layers.items()}
        result = compare(calls, rounds=9, slice_seconds=0.005, max_seconds=4.0)
        features = (inputs, *layers[FORMS[0]].widths, outputs)
        seconds = {form: result.time(form).median for form in FORMS}
        title = f"linear {inputs} -> {outputs} B{batch}"
        found.append((title, linear_forms(features, batch), seconds))
    return found


def fit(measured: Measured) -> dict[str, float]:
    """Seconds of one of each kind of work, by least squares of relative errors."""
    counts, seconds = [], []
    for _, forms, times in measured:
        for work, form in zip(forms, FORMS, strict=True):
            counts.append(work)
            seconds.append(times[form])
    matrix = torch.tensor(counts, dtype=torch.float64) / torch.tensor(seconds)[:, None]
    return dict(zip(Work._fields, _non_negative(matrix), strict=True))


def _non_negative(matrix: Tensor) -> list[float]:
    """x >= 0 with the least ``|matrix x - 1|``: coordinate by coordinate, until nothing moves."""
    scale = matrix.norm(dim=0).clamp(min=1e-300)
    scaled = matrix / scale
    products, target = scaled.T @ scaled, scaled.sum(0)
    x = torch.zeros(len(scale), dtype=torch.float64)
    for _ in range(100_000):
        before = x.clone()
        for i in range(len(x)):
            if products[i, i] > 0:
                rest = target[i] - products[i] @ x + products[i, i] * x[i]
                x[i] = max(0.0, float(rest / products[i, i]))
        if float((x - before).abs().max()) < 1e-12 * float(x.max()):
            break
    return [float(f"{value:.3g}") for value in (x / scale).tolist()]


def report(measured: Measured, rates: dict[str, float]) -> None:
    """One line a row; what wrong calls cost."""
    wrong = 0
    for title, forms, times in measured:
        guess = {form: work.seconds(rates) for form, work in zip(FORMS, forms, strict=True)}
        chosen, best = (min(FORMS, key=lambda form: t[form]) for t in (guess, times))
        wrong += chosen != best
        shown = ", ".join(
            f"{form} {times[form] * 1e3:.3f} ms (fit {guess[form] * 1e3:.3f})" for form in FORMS
        )
        cost = times[chosen] / times[best]
        print(f"{title}: {shown}" + ("" if chosen == best else f"  WRONG, costs {cost:.2f}x"))
    print(f"{len(measured) - wrong} of {len(measured)} calls are right")


def main() -> None:
    """Fits and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="JSON of bench_expanded_conv2d.py")
    parser.add_argument("--threads", type=int, default=1, help="of the rows to use")
    options = parser.parse_args()
    rows = json.loads(options.rows.read_text())["rows"]
    measured = [*conv_rows(rows, options.threads), *linear_rows(options.threads)]
    rates = fit(measured)
    print(json.dumps(rates, indent=1))
    report(measured, rates)


if __name__ == "__main__":
    main()
