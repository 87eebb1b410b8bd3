"""Lets torchvision's CUDA build, the only one on PyPI, be imported beside a CPU build of torch.

SGLang and transformers import it and use nothing of it here. Its import registers fake versions of two operators that
its CUDA library would have defined, and fails where they are missing; so they are declared just before. A .pth file
loads this module in every Python process of the environment, since SGLang starts several.
"""

import sys
from importlib.abc import MetaPathFinder


class _DeclareOperators(MetaPathFinder):
    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, _DeclareOperators())
