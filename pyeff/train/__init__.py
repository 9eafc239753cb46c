"""Training: data in memory, the loop, metrics, checkpoints, several processes."""

from pyeff.train.calibrate import calibrate
from pyeff.train.config import TrainConfig, config_from_json
from pyeff.train.evaluate import LevelResult, evaluate
from pyeff.train.interrupt import TrainingInterrupted
from pyeff.train.session import TrainResult
from pyeff.train.tasks import TaskData, load_tasks
from pyeff.train.trainer import Trainer, load_config_tasks

__all__ = [
    "LevelResult",
    "TaskData",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingInterrupted",
    "calibrate",
    "config_from_json",
    "evaluate",
    "load_config_tasks",
    "load_tasks",
]
