"""Low-bit quantization of ConvNets and transformers with low-rank adapters.

Source: CoRa, "Reclaiming Residual Knowledge", arXiv 2408.00923.
"""

__version__ = "0.1.0"

from .calibration import Calibration
from .compare import compare
from .convert import dequantize, quantize
from .diagnosis import Diagnosis, diagnose
from .fuse import fuse
from .fused import FusedModel
from .modules import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantLayer,
    QuantLinear,
)
from .quantizer import QuantSpec
from .report import Report
from .search import SearchConfig
from .serialization import load, save
from .tuning import TuneConfig

__all__ = [
    "Calibration",
    "Diagnosis",
    "FusedModel",
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantLayer",
    "QuantLinear",
    "QuantSpec",
    "Report",
    "SearchConfig",
    "TuneConfig",
    "compare",
    "dequantize",
    "diagnose",
    "fuse",
    "load",
    "quantize",
    "save",
]
