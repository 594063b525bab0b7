"""What a rotated residual stream needs of its blocks: a norm without gain, and shortcuts between two bases.

In a block of SliceGPT (card slicegpt, step 6) the stream comes in in one basis and goes on in another, so the
residual is `x @ shortcut + f(norm(x))`. The block's own code adds `x + f(norm(x))`, and stays: the linear that ends `f`
adds `x @ (shortcut - I)` to its output. It knows `x` because the norm before `f` has left it in a carrier that both
hold.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from leanformers.errors import LeanError
from leanformers.parts.dense import adopt


class Carrier:
    """Hands a tensor from one module to another within one forward pass; nothing stays behind.

    A plain object, no module and no buffer: copies of a model have their own, files hold none, and an exported graph
    has an edge in its place. Threads that run one model side by side do not meet; compiled code, which never leaves a
    tensor here after tracing, shares one place.
    """

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}

    def put(self, states: torch.Tensor) -> None:
        self.held[_thread()] = states

    def take(self) -> torch.Tensor:
        """What was put last.

        Raises:
            LeanError: nothing was: the sub-layer ran without its norm.
        """
        states = self.held.pop(_thread(), None)
        if states is None:
            raise LeanError("A sub-layer of a rotated model ran without the norm before it: run the whole layer.")
        return states

    def __deepcopy__(self, memo: dict[int, Any]) -> Carrier:
        twin = memo[id(self)] = Carrier()
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {"held": {}}


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class RotatedNorm(nn.Module):
    """`x / sqrt(sum(x^2) / width + eps)` over `[..., size]`: RMSNorm without gain, which any rotation commutes with.

    Args:
        width: of the stream before it was sliced; what is gone counts as zeros, so the divisor stays.
        eps: the replaced norm's.
    """

    weight = None  # the gain is in the linears that read the norm
    bias = None
    carrier: Carrier | None

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.carrier = None

    @classmethod
    def like(cls, old: nn.Module, width: int, eps: float) -> RotatedNorm:
        """A part in place of a LayerNorm or RMSNorm."""
        part = cls(width, eps)
        adopt(part, old)
        return part

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.carrier is not None:
            self.carrier.put(hidden_states)
        states = hidden_states.float()
        scale = torch.rsqrt(states.square().sum(-1, keepdim=True) / self.width + self.eps)
        return (states * scale).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"width={self.width}, eps={self.eps}"


class ShortcutLinear(nn.Module):
    """`inner(x) + shortcut(stream)`: the last linear of a sub-layer, and the stream's change of basis.

    `shortcut.weight` is `(Q_in^T Q_out - I)^T`, [size, size]: the block adds the identity itself. `inner` is an
    ordinary linear, so that it can be cut, quantised or adapted in its turn.
    """

    wraps = "inner"  # where the anatomy finds the linear

    def __init__(self, inner: nn.Module, size: int, carrier: Carrier) -> None:
        super().__init__()
        weight: Any = inner.weight
        self.inner = inner
        self.shortcut = nn.Linear(size, size, bias=False, device=weight.device, dtype=weight.dtype)
        self.shortcut.weight.requires_grad_(weight.requires_grad)
        self.carrier = carrier
        self.training = inner.training

    @property
    def weight(self) -> Any:
        """The inner linear's: for code that looks at a weight's dtype."""
        return self.inner.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.carrier, Carrier)
        return self.inner(hidden_states) + self.shortcut(self.carrier.take())
