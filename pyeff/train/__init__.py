"""Training: data in memory, the loop, metrics, checkpoints, several processes."""

from pyeff.train.calibrate import calibrate
from pyeff.train.config import TrainConfig, config_from_json
from pyeff.train.evaluate import LevelResult, evaluate
from pyeff.train.interrupt import TrainingInterrupted
from pyeff.train.segmentation_config import SegmentationConfig, load_segmentation
from pyeff.train.segmentation_metrics import SegmentationScore, evaluate_segmentation
from pyeff.train.segmentation_predict import Segmenter
from pyeff.train.segmentation_trainer import SegmentationResult, SegmentationTrainer
from pyeff.train.session import TrainResult
from pyeff.train.tasks import TaskData, load_tasks
from pyeff.train.trainer import Trainer, load_config_tasks

__all__ = [
    "LevelResult",
    "SegmentationConfig",
    "SegmentationResult",
    "SegmentationScore",
    "SegmentationTrainer",
    "Segmenter",
    "TaskData",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "TrainingInterrupted",
    "calibrate",
    "config_from_json",
    "evaluate",
    "evaluate_segmentation",
    "load_config_tasks",
    "load_segmentation",
    "load_tasks",
]
