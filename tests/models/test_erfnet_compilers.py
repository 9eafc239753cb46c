"""torch.compile and torch.export of ERFNet."""

import pytest
import torch
from models.model_cases import randomise_norms

from pyeff.models import erfnet


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small(**options):
    return randomise_norms(erfnet(5, widths=(4, 8, 12), **options)).eval()


def images(height=16, width=24, n=2):
    return torch.rand(n, 3, height, width)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, check_stride=False)


@pytest.mark.parametrize("options", [{"dense": True}, {"encoder_only": True}], ids=str)
def test_compiles_as_one_graph(options):
    model, x = small(**options), images()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), model(x))


def test_compiles_with_inductor():
    model, x = small(), images(13, 21)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(x), model(x))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        assert_close(compiled(x), model(x))


def test_training_compiles():
    model, x = erfnet(3, widths=(4, 8, 12), dropout=(0.0, 0.0)), images()
    twin = erfnet(3, widths=(4, 8, 12), dropout=(0.0, 0.0))
    twin.load_state_dict(model.state_dict())
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    twin(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-2, msg=name)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-4, msg=name)


def test_exports():
    model, x = small(), images()
    program = torch.export.export(model, (x,))
    pairs = [n for n in program.graph.nodes if "factorized_conv2d" in str(n.target)]
    assert len(pairs) == 34, "one call a pair"
    assert not [n for n in program.graph.nodes if "batch_norm" in str(n.target)]
    with torch.no_grad():
        assert_close(program.module()(x), model(x))


def test_exports_for_any_number_of_images_and_any_size():
    model = small()
    sizes = {0: torch.export.Dim("n"), 2: 8 * torch.export.Dim("h"), 3: 8 * torch.export.Dim("w")}
    program = torch.export.export(model, (images(32, 40),), dynamic_shapes=(sizes,))
    run = program.module()
    for x in (images(32, 40), images(48, 24, n=3)):
        with torch.no_grad():
            assert_close(run(x), model(x))
