import pytest

from pyeff.train import TrainConfig, config_from_json
from pyeff.train.schedule import learning_rate


def rates(schedule, steps=100, warmup=0.0):
    return [
        learning_rate(s, steps, peak=2.0, schedule=schedule, warmup=warmup) for s in range(steps)
    ]


def test_multistep_falls_at_half_and_three_quarters():
    got = rates("multistep")
    assert got[:50] == [2.0] * 50
    assert got[50:75] == pytest.approx([0.2] * 25)
    assert got[75:] == pytest.approx([0.02] * 25)


def test_thirds_fall_at_a_third_and_at_two():
    got = rates("thirds", steps=150)
    assert got[:50] == [2.0] * 50
    assert got[50:100] == pytest.approx([0.2] * 50)
    assert got[100:] == pytest.approx([0.02] * 50)


def test_onecycle_rises_a_quarter_and_falls_in_a_straight_line():
    got = rates("onecycle")
    assert got.index(max(got)) in (24, 25)
    assert max(got) == 2.0
    assert got[0] < 0.2
    assert got[26] - got[27] == pytest.approx(2.0 / 75)
    assert got[99] == pytest.approx(2.0 / 75)


def test_cosine():
    got = rates("cosine")
    assert got[0] == 2.0
    assert got[50] == pytest.approx(1.0)
    assert 0 < got[99] < 0.01


def test_warmup_and_constant():
    got = rates("constant", warmup=0.1)
    assert got[0] == pytest.approx(2.0 * (0.04 + 0.96 / 10))
    assert got[9:] == [2.0] * 91


def test_unknown_schedule():
    with pytest.raises(ValueError, match="schedule must be multistep"):
        learning_rate(0, 10, peak=1.0, schedule="linear")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schedule", "linear"),
        ("epochs", 0),
        ("lr", 0.0),
        ("momentum", 1.0),
        ("limit_train", 0),
        ("clip", -1.0),
        ("tasks", ()),
        ("model", {}),
        ("sandwich_levels", 1),
        ("prune_until", 0.0),
        ("precision", "fp8"),
    ],
)
def test_config_says_which_setting_is_wrong(name, value):
    with pytest.raises(ValueError, match=f"TrainConfig: {name} must"):
        TrainConfig(**{name: value})


def test_config_survives_json():
    config = TrainConfig(tasks=("digits",), lr=0.3, model={"family": "dvn", "levels": 3})
    assert config_from_json(config.to_json()) == config
    with pytest.raises(ValueError, match=r"got \['colour'\]"):
        config_from_json({"colour": 1})
