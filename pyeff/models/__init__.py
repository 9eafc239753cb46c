"""The networks of the papers, made of :mod:`pyeff.nn`."""

from pyeff.models.alexnet_small import AlexNetSmall, alexnet_small
from pyeff.models.backbones import BACKBONES, Backbone, backbone_named
from pyeff.models.build import build
from pyeff.models.decomposeme import DecomposeMe, dec3, decomposeme
from pyeff.models.dvn import DVN, dvn
from pyeff.models.erfnet import ERFNet, erfnet
from pyeff.models.erfnet_public import DroppedParametersWarning, load_public_state_dict
from pyeff.models.expansion import ExpandableNet
from pyeff.models.hydranet import HydraNet, HydraOutput, partition_classes
from pyeff.models.hydranet_cost import HydraCost, PartCost
from pyeff.models.hydranet_densenet import hydranet_densenet
from pyeff.models.hydranet_resnet import hydranet_resnet, hydranet_resnet50
from pyeff.models.hydranet_ressep import hydranet_ressep
from pyeff.models.layout import Active
from pyeff.models.materialise import load_backbone
from pyeff.models.mobilenet_v1 import MobileNetV1, mobilenet_v1
from pyeff.models.mobilenet_v2 import MobileNetV2, mobilenet_v2
from pyeff.models.nested_resnet import NestedResNet
from pyeff.models.nestednet import NestedNet, nestednet
from pyeff.models.resnet import ResNet, build_backbone
from pyeff.models.resnet50_decomposed import resnet50_decomposed
from pyeff.models.shufflenet_v2 import ShuffleNetV2, shufflenet_v2_x0_5
from pyeff.models.smallnet import SmallNet, smallnet
from pyeff.models.unet_small import UNetSmall, unet_small
from pyeff.models.units import active_interval, unit_order
from pyeff.models.yolo_lite import YoloLite, yolo_lite

__all__ = [
    "BACKBONES",
    "DVN",
    "Active",
    "AlexNetSmall",
    "Backbone",
    "DecomposeMe",
    "DroppedParametersWarning",
    "ERFNet",
    "ExpandableNet",
    "HydraCost",
    "HydraNet",
    "HydraOutput",
    "MobileNetV1",
    "MobileNetV2",
    "NestedNet",
    "NestedResNet",
    "PartCost",
    "ResNet",
    "ShuffleNetV2",
    "SmallNet",
    "UNetSmall",
    "YoloLite",
    "active_interval",
    "alexnet_small",
    "backbone_named",
    "build",
    "build_backbone",
    "dec3",
    "decomposeme",
    "dvn",
    "erfnet",
    "hydranet_densenet",
    "hydranet_resnet",
    "hydranet_resnet50",
    "hydranet_ressep",
    "load_backbone",
    "load_public_state_dict",
    "mobilenet_v1",
    "mobilenet_v2",
    "nestednet",
    "partition_classes",
    "resnet50_decomposed",
    "shufflenet_v2_x0_5",
    "smallnet",
    "unet_small",
    "unit_order",
    "yolo_lite",
]
