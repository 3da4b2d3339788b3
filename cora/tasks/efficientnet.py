"""EfficientNet-Lite0 in plain torch; attribute names are those of the published checkpoint."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["EfficientNetLite0"]

# repeats, kernel, stride, expansion, outputs of each stage
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Convolve with TensorFlow's "SAME" padding, which is uneven at stride 2."""
    pads = []
    for size, kernel, stride in zip(
        reversed(x.shape[2:]), reversed(conv.kernel_size), reversed(conv.stride), strict=True
    ):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    out: Tensor = conv(F.pad(x, pads) if any(pads) else x)
    return out


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _MobileBlock(nn.Module):
    """Expand 1x1, depthwise, project 1x1; a residual where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False) if expand > 1 else None
        if expand > 1:
            self._bn0 = _norm(hidden)
        self._depthwise_conv = nn.Conv2d(
            hidden, hidden, kernel, stride=stride, groups=hidden, bias=False
        )
        self._bn1 = _norm(hidden)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if self._expand_conv is not None:
            out = F.relu6(self._bn0(self._expand_conv(out)))
        out = F.relu6(self._bn1(_same(out, self._depthwise_conv)))
        out = self._bn2(self._project_conv(out))
        result: Tensor = out + x if self.residual else out
        return result


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 (no squeeze-and-excite, ReLU6); attribute names are the checkpoint's.

    Maps [N, 3, 224, 224], (x - 127) / 128 of 8-bit RGB, to logits [N, 1000].
    """

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 32, 3, stride=2, bias=False)
        self._bn0 = _norm(32)
        blocks, inputs = [], 32
        for repeats, kernel, stride, expand, outputs in _STAGES:
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(_MobileBlock(inputs, outputs, kernel, step, expand))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inputs, 1280, 1, bias=False)
        self._bn1 = _norm(1280)
        self._fc = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self._bn0(_same(x, self._conv_stem)))
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        logits: Tensor = self._fc(x.mean(dim=(2, 3)))
        return logits
