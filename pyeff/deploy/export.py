"""A trained network as a file that runs without its training: ``export``."""

import copy
import io
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyeff._archive import write_bytes_atomically
from pyeff._extras import require
from pyeff.convert import contract_with_report
from pyeff.convert.compare import apart

_OP = "export"
FORMATS = ("torch", "onnx")
# Sums may be taken in another order; weights are the same.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4}
_LOOSEST = 5e-2  # of half precision


@dataclass(frozen=True)
class ExportReport:
    """What :func:`export` wrote, and how far it lies from the network.

    Attributes:
        path: the file.
        format: ``"torch"`` or ``"onnx"``.
        size: of the file, in bytes.
        contracted: names of the expanded layers that are plain ones in the file.
        parameters: of the network, before and after contraction.
        contraction: largest difference of the contracted network's output on the example, over the
            largest output; the members were run one by one. 0 without expanded layers.
        difference: the same of the file's output, read back and run, from the contracted network's.
        tolerance: what ``difference`` was held to.
    """

    path: str
    format: str
    size: int
    contracted: tuple[str, ...]
    parameters: tuple[int, int]
    contraction: float
    difference: float
    tolerance: float

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON-able document."""
        return asdict(self)

    def __str__(self) -> str:
        before, after = self.parameters
        lines = []
        if self.contracted:
            lines.append(
                f"contracted {len(self.contracted)} layers: {before:,} -> {after:,} parameters, "
                f"output differs by {self.contraction:.1e} of the largest"
            )
        lines.append(
            f"{self.path}: {self.format} program, {self.size:,} bytes, read back and run: output "
            f"differs by {self.difference:.1e} of the largest (tolerance {self.tolerance:.0e})"
        )
        return "\n".join(lines)


def export(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
) -> ExportReport:
    """Writes a network as a program: for ``torch.export.load``, or as ONNX.

    Expanded layers are contracted first. The file is read back and run on the example; it gets its
    name only if its output is the network's.

    Args:
        model: called with one tensor; not changed. A nested network is exported a level at a time,
            as what ``materialise`` gives.
        example: images ``[N, C, H, W]`` or other input, on the model's device; the program is for
            its sizes, but for the first one.
        path: the file to write or replace.
        format: ``"torch"`` or ``"onnx"``; by default ONNX where the name ends in ``.onnx``.
        dynamic_batch: whether the program takes any number of images, rather than the example's.
        tolerance: how far the file's output may lie from the network's, over the largest; by
            default 1e-10 in float64, 1e-4 in float32, 0.05 in half precision.

    Returns:
        What was written.

    Raises:
        TypeError: a model or an example of the wrong kind.
        ValueError: a layer that does not contract, an example that the model does not take, a
            network that cannot be traced as one program, an output beyond the tolerance.
        ImportError: ONNX without the extra ``export``.

    Example:
        >>> model = pyeff.models.smallnet(expand="ck")
        >>> report = export(model, torch.randn(1, 3, 32, 32), "small.pt2")  # doctest: +SKIP
        >>> run = torch.export.load("small.pt2").module()  # doctest: +SKIP
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{_OP}: model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(example, Tensor):
        raise TypeError(f"{_OP}: example must be a tensor, got {type(example).__name__}")
    if not example.dim() or not len(example):
        raise ValueError(f"{_OP}: example must hold an image, got {list(example.shape)}")
    chosen = _format_of(path, format)
    if tolerance is None:
        tolerance = _TOLERANCES.get(example.dtype, _LOOSEST)
    plain, about = contract_with_report(copy.deepcopy(model).eval(), example)
    # Traced with two images: a size of 1 is one that torch.export takes for fixed.
    traced = torch.cat([example, example]) if dynamic_batch and len(example) == 1 else example
    with torch.no_grad():
        expected = plain(example)
    if not isinstance(expected, Tensor):
        raise ValueError(f"{_OP}: model must give one tensor, got {type(expected).__name__}")
    write = _torch_bytes if chosen == "torch" else _onnx_bytes
    content, found = write(plain, traced, example, dynamic_batch)
    difference = apart([found], [expected]).relative
    if not difference <= tolerance:
        raise ValueError(
            f"{_OP}: the program's output must differ by no more than {tolerance:.1e} of the "
            f"largest, got {difference:.1e}; {os.fspath(path)} is not written"
        )
    write_bytes_atomically(path, content)
    return ExportReport(
        os.fspath(path),
        chosen,
        len(content),
        tuple(layer.name for layer in about.layers),
        about.parameters,
        about.relative or 0.0,
        difference,
        tolerance,
    )


def _format_of(path: str | os.PathLike[str], format: str | None) -> str:
    if format is None:
        return "onnx" if Path(path).suffix == ".onnx" else "torch"
    if format not in FORMATS:
        raise ValueError(f"{_OP}: format must be 'torch' or 'onnx', got {format!r}")
    return format


def _program(model: nn.Module, traced: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    batch = {0: torch.export.Dim.DYNAMIC} if dynamic_batch else {}
    try:
        with torch.no_grad():
            return torch.export.export(model, (traced,), dynamic_shapes=(batch,))
    except Exception as error:
        # Whatever tracing raises for a network that is not one program of tensors.
        raise ValueError(
            f"{_OP}: model must be traceable by torch.export, got {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _torch_bytes(
    model: nn.Module, traced: Tensor, example: Tensor, dynamic_batch: bool
) -> tuple[bytes, Tensor]:
    """The file's content, and what it gives for the example once it is read back."""
    file = io.BytesIO()
    torch.export.save(_program(model, traced, dynamic_batch), file)
    content = file.getvalue()
    loaded = torch.export.load(io.BytesIO(content)).module()
    with torch.no_grad():
        return content, loaded(example)


def _onnx_bytes(
    model: nn.Module, traced: Tensor, example: Tensor, dynamic_batch: bool
) -> tuple[bytes, Tensor]:
    purpose = "to write ONNX"
    for module in ("onnx", "onnxscript"):
        require(module, "export", purpose)
    runtime = require("onnxruntime", "export", purpose + " that was run once")
    if example.dtype == torch.bfloat16:
        raise ValueError(f"{_OP}: example must be of a type that NumPy has, got {example.dtype}")
    program = _program(model, traced, dynamic_batch)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["output"]}
    try:
        made = torch.onnx.export(program, (traced,), **names, dynamo=True, verbose=False)
    except RuntimeError as error:
        # torch.onnx's own errors are such, for operators that it has no translation of.
        raise ValueError(
            f"{_OP}: model must be of operators that ONNX has, got {_first_line(error)}"
        ) from error
    if made is None:
        raise ValueError(f"{_OP}: torch.onnx.export must give a program, got None")
    content: bytes = made.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (name,) = (given.name for given in session.get_inputs())
    (output,) = session.run(None, {name: example.detach().cpu().numpy()})
    return content, torch.from_numpy(output).to(example.device)
