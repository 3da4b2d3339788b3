"""ResNet-18 and ResNet-50 as torchvision names and builds them (He et al. 2015; stride on the 3 x 3),
with seeded random weights whose BatchNorm statistics come from images."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: two 3 x 3 convolutions, or 1 x 1, 3 x 3, 1 x 1 with four times the channels."""

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        out = 4 * width if bottleneck else width
        if bottleneck:
            plan = [(channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        else:
            plan = [(channels, width, 3, stride), (width, width, 3, 1)]
        self.layers = len(plan)
        for i, (inputs, outputs, kernel, step) in enumerate(plan, 1):
            conv = nn.Conv2d(inputs, outputs, kernel, step, kernel // 2, bias=False)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"bn{i}", nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.layers == 3:
            y = self.bn3(self.conv3(self.relu(y)))
        return self.relu(y + shortcut)


class ResNet(nn.Module):
    """Names of parameters are torchvision's: its checkpoints load."""

    def __init__(self, blocks: tuple[int, ...], bottleneck: bool, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, count in enumerate(blocks):
            width, stride = 64 << stage, 1 if stage == 0 else 2
            layers = []
            for i in range(count):
                layers.append(Block(channels, width, stride if i == 0 else 1, bottleneck))
                channels = 4 * width if bottleneck else width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet18() -> ResNet:
    return ResNet((2, 2, 2, 2), bottleneck=False)


def resnet50() -> ResNet:
    return ResNet((3, 4, 6, 3), bottleneck=True)


NETWORKS = {"ResNet-18": resnet18, "ResNet-50": resnet50}


def random_network(name: str, images: Iterable[Tensor], seed: int = 0) -> ResNet:
    """He-initialised weights and the statistics of `images` in every BatchNorm, in eval mode: activations
    have the ranges of a trained network's, not of an exploding one's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name]()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # an average over the batches
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
    with torch.no_grad():
        model.train()
        for batch in images:
            model(batch)
    return model.eval()


def fused(model: ResNet) -> ResNet:
    """A copy with every BatchNorm folded into its convolution, as every inference library does."""
    model = copy.deepcopy(model).eval()
    for module, names in _pairs(model):
        conv, norm = (getattr(module, name) for name in names)
        setattr(module, names[0], nn.utils.fuse_conv_bn_eval(conv, norm))
        setattr(module, names[1], nn.Identity())
    return model


def without_batch_norm(model: ResNet) -> ResNet:
    """The architecture that `fused` makes, in place, its weights as they are."""
    for module, names in _pairs(model):
        conv = getattr(module, names[0])
        conv.bias = nn.Parameter(torch.empty(conv.out_channels, device=conv.weight.device))
        setattr(module, names[1], nn.Identity())
    return model.eval()


def _pairs(model: ResNet) -> list[tuple[nn.Module, tuple[str, str]]]:
    """Convolutions and the BatchNorms after them: (parent, their names)."""
    found: list[tuple[nn.Module, tuple[str, str]]] = []
    for module in model.modules():
        if isinstance(module, ResNet | Block):
            kept = [i for i in range(1, 4) if hasattr(module, f"conv{i}")]
            found += [(module, (f"conv{i}", f"bn{i}")) for i in kept]
        if isinstance(module, Block) and module.downsample is not None:
            found.append((module.downsample, ("0", "1")))
    return found
