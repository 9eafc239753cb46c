"""Native kernels; see csrc/bindings. Every tensor stays owned by the caller."""

from typing import Any

from torch import Tensor

version: str
compiler: str

def cuda_info() -> dict[str, Any]: ...
def call_key(x: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> bytes: ...
def isa() -> str: ...
def run_fma_loop(repeats: int, threads: int) -> float: ...
def available_isas() -> list[str]: ...
def force_isa(name: str | None) -> None: ...
def nested_conv2d_packed_elements(weight: Tensor, groups: int) -> int: ...
def nested_conv2d_pack(weight: Tensor, packed: Tensor, groups: int, threads: int) -> None: ...
def nested_conv2d_forward(
    x: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
def nested_conv2d_grad_input(
    grad_y: Tensor,
    weight: Tensor,
    grad_x: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
def nested_conv2d_grad_weight(
    grad_y: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    in_index: Tensor | None,
    out_index: Tensor | None,
    problem: tuple[int, ...],
) -> None: ...
