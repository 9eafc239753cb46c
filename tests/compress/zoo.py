"""Networks of torchvision and timm, small ones: name -> (a function that builds it, image size)."""

import importlib
import sys

import torch
from torch import nn

_KEPT = []  # a library must outlive what it defines


def torchvision():
    """The package; beside the CPU build of torch its compiled operators do not load."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)
    return importlib.import_module("torchvision")


def models():
    torchvision()
    return importlib.import_module("torchvision.models")


def resnet():
    tv = models().resnet
    return tv.ResNet(tv.BasicBlock, [1, 1, 1, 1], num_classes=10)


def resnext():
    tv = models().resnet
    return tv.ResNet(tv.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=8, width_per_group=2)


def densenet():
    return models().DenseNet(8, (2, 3, 2), num_init_features=16, num_classes=10)


def mobilenet_v2():
    return models().mobilenet_v2(width_mult=0.25, num_classes=10)


def mobilenet_v3():
    return models().mobilenet_v3_small(width_mult=0.5, num_classes=10)


def efficientnet():
    tv = models().efficientnet
    stages = [
        tv.MBConvConfig(1, 3, 1, 16, 8, 1),
        tv.MBConvConfig(4, 3, 2, 8, 16, 2),
        tv.MBConvConfig(4, 5, 2, 16, 24, 1),
    ]
    return tv.EfficientNet(stages, dropout=0.1, num_classes=10)


def efficientnet_v2():
    tv = models().efficientnet
    stages = [
        tv.FusedMBConvConfig(1, 3, 1, 16, 16, 1),
        tv.FusedMBConvConfig(4, 3, 2, 16, 24, 2),
        tv.MBConvConfig(4, 3, 2, 24, 32, 1),
    ]
    return tv.EfficientNet(stages, dropout=0.1, num_classes=10, last_channel=64)


def convnext():
    tv = models().convnext
    stages = [tv.CNBlockConfig(16, 32, 1), tv.CNBlockConfig(32, None, 2)]
    return tv.ConvNeXt(stages, layer_scale=0.5, num_classes=10)


def regnet(se_ratio):
    tv = models().regnet
    plan = tv.BlockParams.from_init_params(
        depth=6, w_0=16, w_a=10.0, w_m=2.0, group_width=8, se_ratio=se_ratio
    )
    return tv.RegNet(plan, num_classes=10)


def shufflenet():
    return models().ShuffleNetV2([2, 2, 2], [8, 16, 32, 64, 64], num_classes=10)


def googlenet():
    return models().GoogLeNet(num_classes=10, aux_logits=False, init_weights=False)


def inception():
    """Inception v3's five kinds of blocks on a narrow trunk."""
    tv = models().inception
    return nn.Sequential(
        tv.BasicConv2d(3, 32, kernel_size=3, stride=2),
        tv.InceptionA(32, pool_features=16),
        tv.InceptionB(240),
        tv.InceptionC(720, channels_7x7=16),
        tv.InceptionD(768),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(1280, 10),
    )


def vgg():
    tv = models().vgg
    plan = [16, "M", 24, "M", 32, 32, "M", 48, "M"]
    return nn.Sequential(
        tv.make_layers(plan, batch_norm=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(48 * 4, 64),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(64, 10),
    )


def squeezenet():
    return models().squeezenet1_1(num_classes=10)


def mnasnet():
    return models().MNASNet(0.35, num_classes=10)


def timm(name, **options):
    torchvision()
    return importlib.import_module("timm").create_model(name, num_classes=10, **options)


TORCHVISION = {
    "resnet": (resnet, 32),
    "resnext": (resnext, 32),
    "densenet": (densenet, 32),
    "mobilenet_v2": (mobilenet_v2, 32),
    "mobilenet_v3": (mobilenet_v3, 32),
    "efficientnet": (efficientnet, 32),
    "efficientnet_v2": (efficientnet_v2, 32),
    "convnext": (convnext, 32),
    "regnet_x": (lambda: regnet(None), 32),
    "regnet_y": (lambda: regnet(0.25), 32),
    "shufflenet": (shufflenet, 32),
    "googlenet": (googlenet, 32),
    "inception": (inception, 47),
    "vgg": (vgg, 32),
    "squeezenet": (squeezenet, 32),
    "mnasnet": (mnasnet, 32),
}
TIMM = {
    "repvgg": (lambda: timm("repvgg_a0"), 32),
    "vovnet": (lambda: timm("ese_vovnet19b_slim_dw"), 32),
    "resnetv2": (
        lambda: timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(32, 64, 96, 128)),
        32,
    ),
}
