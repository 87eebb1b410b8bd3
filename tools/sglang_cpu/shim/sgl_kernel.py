"""Stands in for SGLang's CUDA kernels, of which there is no CPU build.

SGLang imports names from here on start; on a CPU none of them is called. So every name exists and raises when used.
"""

from collections.abc import Callable

__path__: list[str] = []  # a package without modules: `import sgl_kernel.x` fails as it would without kernels
__version__ = "0.4.10"  # what SGLang 0.5.23 pins


def __getattr__(name: str) -> Callable[..., None]:
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError(f"{name} is a CUDA kernel; this SGLang serves on a CPU")

    return absent
