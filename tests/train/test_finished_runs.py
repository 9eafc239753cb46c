"""A benchmark's finished run of another recipe is not collected as one of this."""

import json
import sys
from pathlib import Path

import pytest
from train.segmentation_tiny import segmentation_config

from pyeff.train.segmentation_config import SegmentationConfig

MODELS = Path(__file__).resolve().parents[2] / "benchmarks" / "models"


@pytest.fixture
def script(monkeypatch):
    for folder in (MODELS, MODELS.parent):
        monkeypatch.syspath_prepend(folder)
    import erfnet_camvid

    yield erfnet_camvid
    for name in ("erfnet_camvid", "finished_runs", "timing"):
        sys.modules.pop(name, None)


def leave(config: SegmentationConfig) -> None:
    folder = Path(config.out)
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps({"config": config.to_json(), "results": []}))


def test_a_finished_run_of_this_recipe_is_taken_wherever_it_began(script, tmp_path):
    began = segmentation_config(tmp_path / "a", init_from="elsewhere/streets_s0", data="there")
    leave(began)
    now = segmentation_config(tmp_path / "a", init_from="here/streets_s0", data="here")
    assert script.finished(now)["results"] == []


def test_a_finished_run_of_another_recipe_is_refused(script, tmp_path):
    leave(segmentation_config(tmp_path / "a", epochs=2))
    with pytest.raises(SystemExit, match=r"a must be a run of this recipe.*epochs: 2 .* 9 here"):
        script.finished(segmentation_config(tmp_path / "a", epochs=9))
    with pytest.raises(SystemExit, match="b must hold a finished run, got none"):
        script.finished(segmentation_config(tmp_path / "b"))
