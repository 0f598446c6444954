"""A pytest plugin: torchvision's Python imports even where its wheel was built for another torch than the installed one.

Its import describes two operators of its library, which does not load then; they are declared here, without a kernel.
"""

import sys

import torch

try:
    import torchvision
except RuntimeError:
    LIBRARY = torch.library.Library("torchvision", "DEF")  # the declarations last as long as the object
    for name in ("nms", "qnms"):
        LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    import torchvision  # noqa: F401
