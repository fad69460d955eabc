"""Fixed or learned keys that distinguish the slots of a sum (DataMUX, MUX-PLM)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.errors import one_of

Keys = Literal["gaussian", "orthogonal"]


class GaussianKeys(nn.Module):
    """One vector v_k per slot, a Gaussian vector of fixed norm, which multiplies the slot's states elementwise.

    Args:
        num_inputs: N.
        hidden: d.
        norm: norm of each v_k. None means √d, so that the entries have unit variance and the states keep their scale.
            The default of the published DataMUX code is 1.
        learn: whether to train the keys.
    """

    def __init__(self, num_inputs: int, hidden: int, norm: float | None, learn: bool) -> None:
        super().__init__()
        keys = nn.functional.normalize(torch.randn(num_inputs, hidden, dtype=torch.float32), dim=-1)
        self.keys = nn.Parameter(keys * (hidden**0.5 if norm is None else norm), requires_grad=learn)

    def forward(self, slots: Tensor) -> Tensor:
        """Multiply each slot by its key: (G, N, S, d) to (G, N, S, d)."""
        return slots * self.keys[:, None, :]

    def mix(self, slots: Tensor) -> Tensor:
        """The mean over slots of slot times key: (G, N, S, d) to (G, S, d)."""
        return self(slots).mean(dim=1)


class OrthogonalKeys(nn.Module):
    """One random orthogonal d × d matrix per slot.

    Args:
        num_inputs: N.
        hidden: d.
        learn: whether to train the matrices.
    """

    def __init__(self, num_inputs: int, hidden: int, learn: bool) -> None:
        super().__init__()
        matrices = [nn.Linear(hidden, hidden, bias=False) for _ in range(num_inputs)]
        for matrix in matrices:
            nn.init.orthogonal_(matrix.weight)
        self.keys = nn.ModuleList(matrices)
        self.requires_grad_(learn)

    def mix(self, slots: Tensor) -> Tensor:
        """The sum over slots of matrix times slot, divided by √N: (G, N, S, d) to (G, S, d)."""
        rotated = [key(slot) for key, slot in zip(self.keys, slots.unbind(dim=1), strict=True)]  # N × (G, S, d)
        return torch.stack(rotated).sum(dim=0) / len(self.keys) ** 0.5


def build_keys(
    kind: Keys, num_inputs: int, hidden: int, norm: float | None, learn: bool
) -> GaussianKeys | OrthogonalKeys:
    """Build the keys of a kind.

    Raises:
        UserError: the kind is unknown.
    """
    if kind == "gaussian":
        return GaussianKeys(num_inputs, hidden, norm, learn)
    if kind == "orthogonal":
        return OrthogonalKeys(num_inputs, hidden, learn)
    raise one_of("keys", kind, ["gaussian", "orthogonal"], "set keys to one of these")


def hidden_without_padding(states: HiddenState) -> Tensor:
    """The hidden states (G, N, S, d) with zeros at padding, so that padding does not affect the other inputs."""
    return states.hidden * states.mask.unsqueeze(-1)
