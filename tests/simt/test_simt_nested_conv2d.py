"""nested_conv2d's CUDA kernels on the host, against the float64 reference."""

import pytest
import torch
from numerics import assert_close, in_layout
from ops.conv_cases import CASES, Case, random_case
from ops.test_nested_conv2d import LAYOUTS, check

import pyeff
from pyeff.ops import _nested_conv2d_cuda as cuda
from pyeff.ops import nested_conv2d
from pyeff.ops._conv_args import padding_sides, pair
from pyeff.ops._nested_conv2d_backends import Conv
from pyeff.reference.nested_conv2d import nested_conv2d as reference

OPERATORS = ("nested_conv2d",)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# A copy of 16 bytes needs aligned channels on every side: a layer that has them, and ragged tiles.
ALIGNED = Case(2, 48, 88, (6, 5), in_range=(8, 40), out_range=(8, 80), padding=1)
SEVERAL_TILES = Case(1, 80, 144, (9, 10), in_range=(0, 72), out_range=(0, 136), padding=1)
DEPTHWISE = Case(2, 40, 40, (6, 7), groups=40, in_range=(8, 32), out_range=(8, 32), padding=1)
KINDS = {
    "aligned": ALIGNED,
    "range": CASES["interval in the middle, not aligned to a vector"],
    "index": CASES["index on both sides"],
    "groups": CASES["whole groups in the middle"],
    "depth-wise": DEPTHWISE,
    "depth-wise, odd": CASES["depth-wise strided and dilated"],
    "stride": CASES["stride and dilation"],
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(simt, case, dtype):
    check(case, dtype, "cpu", "cuda")
    assert simt.launches() or case.n == 0


def conv_of(case):
    """The case as the backends take it, by index tensors or ranges."""
    stride, dilation = pair("t", "s", case.stride, 1), pair("t", "d", case.dilation, 1)
    options = case.options()
    return Conv(
        options.get("in_index", case.in_range or (0, case.channels)),
        options.get("out_index", case.out_range or (0, case.outputs)),
        stride,
        padding_sides("t", case.padding, case.kernel, stride, dilation),
        dilation,
        case.groups,
    )


def gradients(case, dtype, plans, layout="channels_last", grad_y=None):
    """y and the gradients by the backend's own functions, and by the reference in float64."""
    conv = conv_of(case)
    x, weight, bias = case.tensors(dtype)
    x = in_layout(x, layout)
    weight = weight.contiguous(memory_format=torch.channels_last)
    shape = conv.output_shape(x, weight)
    grad_y = torch.randn(shape).to(dtype) if grad_y is None else grad_y
    got = (
        cuda.forward(x, weight, bias, shape, conv, plans),
        cuda.grad_input(grad_y, weight, tuple(x.shape), conv, plans),
        cuda.grad_weight(grad_y, x, tuple(weight.shape), weight.stride(), conv, plans),
    )
    wide = [t.double().requires_grad_() for t in (x, weight)]
    y = reference(*wide, None if bias is None else bias.double(), **case.options())
    want = (y, *torch.autograd.grad(y, wide, grad_y.double()))
    return got, want


def compare(got, want, scale=1.0):
    pixels = got[0].numel() / max(1, got[0].shape[1])
    for g, w, what in zip(got, want, ("y", "grad_x", "grad_weight"), strict=True):
        terms = max(1.0, pixels) ** 0.5 if what == "grad_weight" else 1.0
        assert_close(g, w.detach(), what, scale=4 * scale * terms)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("case", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_shares_of_the_sum(simt, case, dtype, reverse):
    simt.set_reverse(reverse)
    compare(*gradients(case, dtype, cuda.Plan(False, False, 1)))
    if case.groups == case.channels:  # the maps of depth-wise layers are not split
        conv = conv_of(case)
        x, weight, _ = case.tensors(dtype)
        grad_y = torch.randn(conv.output_shape(x, weight)).to(dtype)
        size, strides = tuple(weight.shape), weight.stride()
        one, three = (
            cuda.grad_weight(grad_y, x, size, strides, conv, cuda.Plan(False, False, shares))
            for shares in (1, 3)
        )
        torch.testing.assert_close(one, three, rtol=2e-3, atol=2e-3)
        return
    simt.forget_launches()
    compare(*gradients(case, dtype, cuda.Plan(False, False, 3)))
    names = [launch["name"] for launch in simt.launches()]
    assert names.count("nested_conv2d_sum") == 2
    assert names.count("nested_conv2d_sum_weight") == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_large_tiles(simt, dtype):
    compare(*gradients(SEVERAL_TILES, dtype, cuda.Plan(False, True, 1)))
    assert {launch["block"] for launch in simt.launches()} == {(256, 1, 1)}
    assert len(simt.launches()) == 3


@pytest.mark.parametrize("case", [ALIGNED, SEVERAL_TILES, CASES["index on both sides"]], ids=str)
@pytest.mark.parametrize("large", [False, True])
def test_tf32(simt, case, large):
    got, want = gradients(case, torch.float32, cuda.Plan(True, large, 1))
    compare(got, want, scale=400)  # ten bits of mantissa in place of 23
    exact, _ = gradients(case, torch.float32, cuda.Plan(False, False, 1))
    error = [(g - w).abs().max() for g, w in zip(got, want, strict=True)]
    assert min(error) > 1e-5
    assert (exact[0] - got[0]).abs().max() > 0 or case.n == 0


def test_tf32_follows_torch(simt):
    case = ALIGNED
    x, weight, bias = case.tensors(torch.float32)
    results = []
    for allowed in (False, True):
        torch.backends.cudnn.allow_tf32 = allowed  # each test begins without
        with pyeff.backend("cuda"):
            results.append(nested_conv2d(x, weight, bias, **case.options()))
    want = reference(x.double(), weight.double(), bias.double(), **case.options())
    errors = [(y - want).abs().max().item() for y in results]
    assert errors[0] < 1e-5 < errors[1] < 1e-2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["aligned", "range", "depth-wise"])
def test_layouts(simt, kind, layout):
    check(KINDS[kind], torch.float16, "cpu", "cuda", layout)


@pytest.mark.parametrize("kind", KINDS)
def test_expanded_gradient(simt, kind):
    case = KINDS[kind]
    shape = conv_of(case).output_shape(*case.tensors(torch.float32)[:2])
    grad_y = torch.randn(1, 1, 1, 1).expand(shape)
    compare(*gradients(case, torch.float32, None, grad_y=grad_y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
def test_weight_layouts(simt, kind, weight_layout):
    case = KINDS[kind]
    x, weight, bias = case.tensors(torch.bfloat16)
    weight = in_layout(weight, weight_layout)
    want = reference(x.double(), weight.double(), bias.double(), **case.options())
    with pyeff.backend("cuda"):
        y = nested_conv2d(x, weight, bias.repeat_interleave(2)[::2], **case.options())
    assert_close(y, want, "y")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("block", range(3))
def test_random_problems(simt, block, reverse):
    simt.set_reverse(reverse)
    for seed in range(block * 12, block * 12 + 12):
        dtype = DTYPES[seed % 4]
        check(random_case(seed), dtype, "cpu", "cuda", what=f"{random_case(seed)}")


@pytest.mark.parametrize("stride", [(60000, 50000), (4, 2), (3, 5)])
def test_stride_above_the_image(simt, stride):
    case = Case(2, 4, 4, (3, 2), in_range=(1, 3), stride=stride, padding=1)
    check(case, torch.float32, "cpu", "cuda")


@pytest.mark.parametrize("kind", ["aligned", "index", "depth-wise"])
def test_both_orders_of_threads_agree_bit_for_bit(simt, kind):
    results = []
    for reverse in (False, True):
        torch.manual_seed(0)
        simt.set_reverse(reverse)
        results.append(gradients(KINDS[kind], torch.float16, None)[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_index_outside_of_the_layer_reads_and_writes_nothing(simt):
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(16, 12, 3, 3)
    in_index, out_index = torch.tensor([7, -3, 12]), torch.tensor([0, 16, -1, 4, 2])
    conv = Conv(in_index, out_index, (1, 1), (1, 1, 1, 1), (1, 1), 1)
    y = cuda.forward(x, weight, None, (2, 5, 5, 6), conv)
    grad_y = torch.randn(y.shape)
    grad_w = cuda.grad_weight(grad_y, x, tuple(weight.shape), weight.stride(), conv)
    grad_x = cuda.grad_input(grad_y, weight, (2, 3, 5, 6), conv)
    assert (y[:, [1, 2]] == 0).all()
    assert (y[:, [0, 3, 4]] != 0).any()
    assert (grad_x[:, [1, 2]] == 0).all()
    assert (grad_x[:, 0] != 0).any()
    assert (grad_w != 0).any(dim=(2, 3)).nonzero().tolist() == [[0, 7], [2, 7], [4, 7]]


def test_small_batches_are_split_and_the_stream_is_the_callers(simt):
    case = CASES["one image, large"]
    x, weight, bias = case.tensors(torch.float16)
    with pyeff.backend("cuda"):
        nested_conv2d(x, weight, bias, **case.options())
    launches = simt.launches()
    assert [launch["name"] for launch in launches] == ["nested_conv2d"]
    assert launches[0]["grid"] == (2, 1, 1)  # 196 pixels in tiles of 128
    assert {launch["stream"] for launch in launches} == {0x517}
    x, weight = torch.randn(1, 96, 4, 4).half(), torch.randn(32, 96, 3, 3).half()
    simt.forget_launches()
    with pyeff.backend("cuda"):
        y = nested_conv2d(x, weight, padding=1)
    assert [launch["name"] for launch in simt.launches()] == ["nested_conv2d", "nested_conv2d_sum"]
    assert simt.launches()[0]["grid"] == (3, 1, 1)  # 27 steps in shares of at least eight
    want = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    assert (y - want).abs().max() < 2e-3 * want.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(simt, kind):
    case = KINDS[kind]
    x, weight, bias = case.tensors(torch.float32)
    weight.requires_grad_()
    with pyeff.backend("cuda"):
        y = nested_conv2d(x[:0], weight, bias, **case.options())
        y.sum().backward()
    assert y.shape[0] == 0
    assert (weight.grad == 0).all()


def test_errors(simt):
    x, weight = torch.randn(1, 8, 5, 5), torch.randn(8, 8, 3, 3)
    y, problem = torch.empty(1, 8, 3, 3), (0, 8, 0, 8, 1, 1, 0, 0, 1, 1, 1, 0, 0)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))

    def run(shares=1, workspace=None, x=x):
        simt.nested_conv2d_forward_cuda(
            x, weight, None, y, workspace, None, None, (*problem, shares)
        )

    run()
    with pytest.raises(ValueError, match="workspace must be there for more than one share"):
        run(shares=2)
    with pytest.raises(ValueError, match="workspace must be there for more than one share"):
        run(workspace=torch.empty(1, 72))
    with pytest.raises(ValueError, match="workspace"):
        run(shares=2, workspace=torch.empty(2, 71))
    with pytest.raises(ValueError, match="workspace must be float32"):
        run(shares=2, workspace=torch.empty(2, 72, dtype=torch.float64))
    with pytest.raises(ValueError, match="shares must be at least 1"):
        run(shares=0)
    with pytest.raises(ValueError, match=r"x must have fewer than 2\^31 - 1024 pixels"):
        run(x=x[:, :, :1, :1].expand(1, 8, 2**30, 2))
