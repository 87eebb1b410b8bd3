"""Named weight copies on the host, and the reference that is one of them.

A copy is swapped in by writing into the parameters themselves: the optimizer and the gradient buffers hold views of
them, so re-pointing a parameter would detach it from both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class WeightCopies:
    """Copies of this rank's parameters under names, on the host (pinned where there is a GPU)."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._copies: dict[str, dict[str, torch.Tensor]] = {}

    @torch.no_grad()
    def backup(self, name: str) -> None:
        """Copy the current weights to `name`."""
        if name not in self._copies:
            self._copies[name] = {key: _host_buffer(value) for key, value in self._parameters.items()}
        for key, parameter in self._parameters.items():
            self._copies[name][key].copy_(parameter)

    @torch.no_grad()
    def restore(self, name: str) -> None:
        """Write the copy `name` into the parameters."""
        for key, parameter in self._parameters.items():
            parameter.copy_(self._copies[name][key])

    @contextlib.contextmanager
    def swapped_in(self, name: str) -> Iterator[None]:
        """The weights are those of `name` within, and bit for bit what they were after."""
        self.backup("current")
        self.restore(name)
        try:
            yield
        finally:
            self.restore("current")

    def __getitem__(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a copy, by parameter name; writing into them changes the copy."""
        return self._copies[name]


def _host_buffer(like: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=like.device.type == "cuda")
