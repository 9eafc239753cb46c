import pytest

from pyeff.train.compress_options import check_compress, parse_compress


def test_words_become_numbers_and_flags():
    text = "group=auto, rank=0.5,alpha=0.5,first_layers=2,include_norm=yes,mask=false,every=epoch"
    assert parse_compress(text) == {
        "group": "auto",
        "rank": 0.5,
        "alpha": 0.5,
        "first_layers": 2,
        "include_norm": True,
        "mask": False,
        "every": "epoch",
    }
    assert parse_compress("rank=auto,every=20,round_to=8,form=spatial,only_if=both") == {
        "rank": "auto",
        "every": 20,
        "round_to": 8,
        "form": "spatial",
        "only_if": "both",
    }


def test_what_was_checked_is_left_as_it_is():
    options = parse_compress("group=2,rank=auto,floor=8,tied=skip,round_to=auto,constants=keep")
    assert check_compress(options) == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group", "options must be NAME=VALUE,NAME=VALUE, got 'group'"),
        ("group=", "options must be NAME=VALUE"),
        ("group=auto,", "options must be NAME=VALUE"),
        ("group=1,group=2", "an option must be given once, got group twice"),
        ("group=auto,speed=2", "options must be among group, rank, .*, got speed"),
        ("alpha=0.5", "options must name group or rank, got alpha"),
        ("group=much", "group must be a number, got 'much'"),
        ("group=0", "group must be auto or above 0, got '0'"),
        ("rank=nan", "rank must be auto or above 0, got 'nan'"),
        ("group=inf", "group must be auto or above 0, got 'inf'"),
        ("group=1,alpha=2", r"alpha must be in \[0, 1\], got '2'"),
        ("group=1,first_layers=1.5", "first_layers must be a number, got '1.5'"),
        ("group=1,floor=0", "floor must be a whole number of at least 1, got '0'"),
        ("group=1,mask=maybe", "mask must be true or false, got 'maybe'"),
        ("group=1,tied=loose", "tied must be one of joint, skip, got 'loose'"),
        ("group=1,every=day", "every must be a number, got 'day'"),
        ("rank=1,floor=4,alpha=0.5", "alpha, floor must come with group, got rank alone"),
        ("group=1,form=x", "form must be one of channel, spatial, auto, got 'x'"),
    ],
)
def test_bad_words(text, message):
    with pytest.raises(ValueError, match=f"compress: {message}"):
        parse_compress(text)
