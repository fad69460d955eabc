"""Fixed or learned keys that tell the slots of a sum apart (DataMUX, MUX-PLM)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from revmux.backbone import HiddenState
from revmux.errors import one_of

Keys = Literal["gaussian", "orthogonal"]


class GaussianKeys(nn.Module):
    """One vector v_k a slot, of Gaussian direction and fixed length, multiplied into the slot's states.

    Args:
        num_inputs: N.
        hidden: d.
        norm: length of every v_k; None is √d, so that the entries have unit variance and the states keep
            their size. The published DataMUX code has 1 by default.
        learn: train the keys.
    """

    def __init__(self, num_inputs: int, hidden: int, norm: float | None, learn: bool) -> None:
        super().__init__()
        keys = nn.functional.normalize(torch.randn(num_inputs, hidden, dtype=torch.float32), dim=-1)
        self.keys = nn.Parameter(keys * (hidden**0.5 if norm is None else norm), requires_grad=learn)

    def forward(self, slots: Tensor) -> Tensor:
        """(G, N, S, d) to the same shape, each slot times its key."""
        return slots * self.keys[:, None, :]

    def mix(self, slots: Tensor) -> Tensor:
        """(G, N, S, d) to the mean over slots of slot times key: (G, S, d)."""
        return self(slots).mean(dim=1)


class OrthogonalKeys(nn.Module):
    """One random orthogonal d × d matrix a slot.

    Args:
        num_inputs: N.
        hidden: d.
        learn: train the matrices.
    """

    def __init__(self, num_inputs: int, hidden: int, learn: bool) -> None:
        super().__init__()
        matrices = [nn.Linear(hidden, hidden, bias=False) for _ in range(num_inputs)]
        for matrix in matrices:
            nn.init.orthogonal_(matrix.weight)
        self.keys = nn.ModuleList(matrices)
        self.requires_grad_(learn)

    def mix(self, slots: Tensor) -> Tensor:
        """(G, N, S, d) to the sum over slots of matrix times slot, over √N: (G, S, d)."""
        turned = [key(slot) for key, slot in zip(self.keys, slots.unbind(dim=1), strict=True)]  # N × (G, S, d)
        return torch.stack(turned).sum(dim=0) / len(self.keys) ** 0.5


def build_keys(
    kind: Keys, num_inputs: int, hidden: int, norm: float | None, learn: bool
) -> GaussianKeys | OrthogonalKeys:
    """Keys by name.

    Raises:
        UserError: no such kind.
    """
    if kind == "gaussian":
        return GaussianKeys(num_inputs, hidden, norm, learn)
    if kind == "orthogonal":
        return OrthogonalKeys(num_inputs, hidden, learn)
    raise one_of("keys", kind, ["gaussian", "orthogonal"], "set keys to one of these")


def ended_slots_empty(states: HiddenState) -> Tensor:
    """(G, N, S, d) with zeros where an input has ended, so that padding cannot reach its neighbours."""
    return states.hidden * states.mask.unsqueeze(-1)
