"""Deep virtual networks: what is active, and what it equals."""

import json

import pytest
import torch
from models.model_cases import images, randomise_norms

from pyeff.models import build, build_backbone, dvn, load_backbone

TASKS = {"fine": 7, "coarse": 3}
MODES = ("full", "inner", "grouped")


def small(mode="full", levels=4, backbone="resnet8", **options):
    options = {"widths": [8, 16, 32], **options}
    model = dvn(backbone, TASKS, levels, mode, **options)
    return randomise_norms(model).double().eval()


def every(model):
    return [(task, level) for task in model.tasks for level in range(1, model.levels + 1)]


CASES = {  # backbone options that take another path each
    "option A": {},
    "units of unequal size": {"widths": [10, 20, 40], "levels": 3},
    "stem narrower, ratio 4": {"backbone": "wrn32_4", "depths": [1, 1, 1], "stem_width": 4},
    "projection, pre-activation": {"backbone": "wrn28_10", "depths": [1, 1, 1], "stem_width": 4},
    "basic, post-activation": {"backbone": "resnet18", "depths": [1, 2], "widths": [8, 16]},
    "bottleneck": {"backbone": "resnet50", "depths": [1, 2], "widths": [16, 32]},
    "odd image": {"size": 9},
}


@pytest.mark.parametrize("mode", ["full", "inner"])
@pytest.mark.parametrize("case", CASES)
def test_full_level_equals_the_plain_backbone(case, mode):
    options = dict(CASES[case])
    name, size = options.pop("backbone", "resnet8"), options.pop("size", 8)
    model = small(mode, options.pop("levels", 4), name, **options)
    options = {"widths": [8, 16, 32], **options}
    plain = randomise_norms(build_backbone(name, 3, **options)).double().eval()
    load_backbone(model, plain, "coarse")
    x = images(size=size)
    torch.testing.assert_close(model(x, "coarse"), plain(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_materialised_level_equals_the_nested_forward(case, mode):
    options = dict(CASES[case])
    if mode == "grouped" and options.get("levels") == 3:
        pytest.skip("grouped units are of equal size; test_errors has the message")
    name, size = options.pop("backbone", "resnet8"), options.pop("size", 8)
    model = small(mode, options.pop("levels", 4), name, **options)
    x = images(size=size)
    for task, level in every(model):
        plain = model.materialise(task, level)
        assert all(
            type(m).__module__.startswith(("torch.", "pyeff.models.")) for m in plain.modules()
        )
        assert all(p.is_contiguous() for p in plain.parameters())
        assert not plain.training
        torch.testing.assert_close(plain(x), model(x, task, level), rtol=1e-10, atol=1e-10)


def test_materialised_in_float32():
    model = small().float()
    x = images().float()
    for task, level in every(model):
        close = model.materialise(task, level)(x)
        torch.testing.assert_close(close, model(x, task, level), rtol=1e-5, atol=1e-5)


def test_materialised_weights_are_copies():
    model = small()
    plain = model.materialise("fine", 2)
    x = images(1)
    before = plain(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(plain(x), before)


def convolutions(model, task, level):
    """(weight, mask of its active part) of every convolution in the blocks."""
    ranges = model.activate(task, level).ranges
    for block in model.blocks:
        for name, (inputs, outputs) in block.conv_grids.items():
            weight = getattr(block, name).weight
            inside = torch.zeros_like(weight, dtype=torch.bool)
            columns = slice(None) if model.layout.groups > 1 else slice(*ranges[inputs])
            inside[slice(*ranges[outputs]), columns] = True
            yield weight, inside


@pytest.mark.parametrize("mode", MODES)
def test_a_level_reads_nothing_outside_its_interval(mode):
    model = small(mode)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    x = images()
    for task, level in every(model):
        model.load_state_dict(weights)
        expected = model(x, task, level)
        with torch.no_grad():
            for weight, inside in convolutions(model, task, level):
                weight[~inside] = float("nan")
        assert torch.equal(model(x, task, level), expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_exactly_zero_outside_the_interval(mode):
    model = dvn("resnet8", TASKS, 4, mode, widths=[8, 16, 32]).double()
    for task, level in every(model):
        model.zero_grad()
        model(images(8), task, level).square().sum().backward()
        for weight, inside in convolutions(model, task, level):
            assert (weight.grad[~inside] == 0).all()
            assert (weight.grad[inside] != 0).float().mean() > 0.9


def test_every_parameter_gets_a_gradient_from_all_levels_together():
    model = small().train()
    for task, level in every(model):
        model(images(), task, level).square().sum().backward()
    outside = 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        outside += int("norm" not in name and (parameter.grad == 0).all())
    assert outside == 0


def test_levels_are_nested_for_every_task():
    model = small()
    for task in model.tasks:
        for level in range(1, model.levels):
            narrow = model.activate(task, level).ranges
            wide = model.activate(task, level + 1).ranges
            assert all(w[0] <= n[0] < n[1] <= w[1] for n, w in zip(narrow, wide, strict=True))
        assert model.activate(task).ranges == model.layout.full_ranges()


def test_tasks_start_from_their_own_unit():
    model = small()
    assert model.activate("fine", 1).ranges[0] == (0, 2)
    assert model.activate("coarse", 1).ranges[0] == (2, 4)
    moved = small(start_units={"coarse": 4})
    assert moved.activate("coarse", 2).ranges[0] == (4, 8)
    assert moved.activate("fine", 1).ranges[0] == (0, 2)


@pytest.mark.parametrize("mode", MODES)
def test_mixed_batch_equals_one_by_one(mode):
    model = small(mode)
    x = images(7)
    tasks = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    levels = torch.tensor([1, 4, 2, 1, 2, 3, 4])
    mixed = model(x, tasks, levels)
    assert mixed.shape == (7, 7)
    for i in range(7):
        one = model(x[i : i + 1], int(tasks[i]), int(levels[i]))[0]
        torch.testing.assert_close(mixed[i, : len(one)], one, rtol=1e-10, atol=1e-10)
        assert (mixed[i, len(one) :] == float("-inf")).all()
    torch.testing.assert_close(model(x, "fine", levels)[0, :7], mixed[0, :7])
    torch.testing.assert_close(model(x, tasks, 4)[1], mixed[1])
    assert model(x[:0], tasks[:0], levels[:0]).shape == (0, 7)


def test_private_norms_do_not_disturb_each_other():
    model = small().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(images(), "coarse", 2)
    for name, after in model.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            changed = (after != before[name]).any(-1)
            assert changed.tolist() == [[False] * 4, [False, True, False, False]], name


def test_den_stem_takes_each_task_at_its_own_size():
    sizes = {"fine": 32, "coarse": 96}
    model = small(stem="den", image_sizes=sizes)
    assert [stem.conv.stride for stem in model.stems] == [(1, 1), (3, 3)]
    for task, size in sizes.items():
        x = images(2, size)
        assert model.stem_of(list(TASKS).index(task))(x, model.activate(task)).shape[2:] == (32, 32)
        plain = model.materialise(task, 2)
        torch.testing.assert_close(plain(x), model(x, task, 2), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_state_dict_and_config_rebuild_the_model(mode):
    model = small(mode, start_units={"fine": 2}, norm_affine="task")
    other = build(json.loads(json.dumps(model.config))).double().eval()
    other.load_state_dict(model.state_dict())
    x = images()
    for task, level in every(model):
        assert torch.equal(model(x, task, level), other(x, task, level))


def test_channels_last_in_and_contiguous_in_agree():
    model = small()
    x = images()
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x, 0, 3), model(last, 0, 3), rtol=1e-10, atol=1e-10)
    active = model.activate(0, 3)
    y = model.stem_of(0)(x, active)
    for block in model.blocks:
        y = block(y, active)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_forward_pass_keeps_no_state():
    model = small()
    keys = {name: set(vars(module)) for name, module in model.named_modules()}
    model(images(), "coarse", 2)
    assert keys == {name: set(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": None}, r"task must be one of \['fine', 'coarse'\], got None"),
        ({"task": "other"}, "task must be one of .* got 'other'"),
        ({"task": 2}, r"task must be in 0\.\.1, got 2"),
        ({"task": 0, "level": 0}, r"level must be in 1\.\.4, got 0"),
        ({"task": 0, "level": 5}, r"level must be in 1\.\.4, got 5"),
        ({"task": 0, "level": torch.tensor(5)}, "level must be at most 4, got 5"),
        ({"task": 0, "level": torch.tensor(0)}, "level must be at least 1, got 0"),
        ({"task": 0, "level": torch.tensor(1.0)}, "level must be a 0-d int64 tensor"),
        ({"task": 0, "level": torch.tensor([1, 2])}, "level must be one integer for each of the 3"),
        ({"task": torch.tensor([0, 1, 2])}, r"task must be in 0\.\.1, got 2"),
    ],
)
def test_call_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        small()(images(), **arguments)


def test_more_call_errors():
    model = small()
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\], got \[3, 1, 8, 8\]"):
        model(images(channels=1), 0)
    with pytest.raises(TypeError, match="level must be an int, a tensor or None, got float"):
        model(images(), 0, 1.0)
    with pytest.raises(TypeError, match="task must be a name, an index or None, got float"):
        model(images(), 1.0)
    with pytest.raises(ValueError, match="must be run in eval mode"):
        model.train()(images(), torch.tensor([0, 1, 0]), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet21"}, "backbone must be one of resnet8, .* got 'resnet21'"),
        ({"slice_mode": "outer"}, "slice_mode must be 'full', 'inner' or 'grouped', got 'outer'"),
        ({"tasks": {}}, "tasks must name at least one task"),
        ({"tasks": {"a": 0}}, "task 'a' must have a positive number of classes"),
        ({"levels": 0}, "levels must be positive, got 0"),
        ({"levels": 20}, "channels must be a multiple of 1 and at least 20 for 20 units, got 16"),
        ({"levels": 3, "slice_mode": "grouped"}, "widths must divide by the 3 units"),
        ({"start_units": {"b": 1}}, r"must name tasks of \['a'\], got \['b'\]"),
        ({"start_units": {"a": 5}}, r"start units must be in 1\.\.4, got \[5\]"),
        ({"stem": "5x5"}, "stem must be '3x3', '7x7' or 'den', got '5x5'"),
        ({"stem": "den"}, "image_size must be at least 32 for stem 'den', got None"),
        ({"in_channels": 0}, "levels and in_channels must be positive, got 4 and 0"),
        ({"widths": [16, 32]}, "widths and depths must be positive and equally many"),
        ({"widths": [16, 24, 48]}, "widths must be multiples of the width before"),
        ({"norm_affine": "all"}, "affine must be one of"),
        ({"backbone": "resnet50", "widths": [6, 8, 8, 8]}, "bottleneck widths must divide by 4"),
    ],
)
def test_constructor_errors(arguments, message):
    arguments = {"backbone": "resnet8", "tasks": {"a": 2}, "levels": 4, **arguments}
    with pytest.raises(ValueError, match=message):
        dvn(**arguments)


def test_load_backbone_errors():
    plain = build_backbone("resnet8", 3, widths=[8, 16, 32]).double()
    with pytest.raises(ValueError, match="must not be of slice mode 'grouped'"):
        load_backbone(small("grouped"), plain, "coarse")
    with pytest.raises(ValueError, match="backbone must have the model's sizes"):
        load_backbone(small(), plain, "fine")


def test_build_errors():
    with pytest.raises(
        ValueError, match=r"family must be one of .*backbone, .*dvn, .*nestednet, .*got 'x'"
    ):
        build({"family": "x"})
    with pytest.raises(ValueError, match="config must hold the arguments of dvn"):
        build({"family": "dvn", "colour": 1})
    with pytest.raises(ValueError, match="classes and in_channels must be positive, got 0 and 3"):
        build({"family": "backbone", "name": "resnet8", "classes": 0})
