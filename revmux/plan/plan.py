"""The plan: the systems to serve, how they were chosen, and whether the promise holds on the test split."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from revmux.plan.choose import Choice, Judged, Outcome, Verification, worst_outcome
from revmux.plan.front import FrontRow


@dataclass(frozen=True)
class Served:
    """A system that a plan serves.

    Attributes:
        judged: the system with its loss on the choosing set.
        verification: its comparison with SISO on the test split.
        folders: adapter folders of the stages, in their order, with their thresholds, as a server loads them; empty for
            SISO.
    """

    judged: Judged
    verification: Verification
    folders: tuple[str, ...] = ()

    @property
    def num_inputs(self) -> int:
        """N of the first stage."""
        return self.judged.candidate.num_inputs


@dataclass(frozen=True)
class Plan:
    """The systems to serve, and why.

    Attributes:
        choice: how they were chosen.
        served: one system per width, narrowest first, or one ladder; the last is the chosen one. Empty if the goal cannot
            be met.
        rows: the systems that were compared, SISO included, on the inputs of the search.
        folder: the folder of the plan's files.
        siso_rate: inputs per second of SISO on this hardware; None if not measured.
    """

    choice: Choice
    served: list[Served]
    rows: list[FrontRow]
    folder: Path
    siso_rate: float | None = None

    @property
    def outcome(self) -> Outcome | None:
        """The worst outcome of the served systems on the test split; None if nothing is served."""
        return worst_outcome([one.verification.outcome for one in self.served]) if self.served else None

    @property
    def is_met(self) -> bool:
        """Whether a system meets the goal and none of the served ones exceeded the allowance on the test split."""
        return self.outcome in ("proven", "not proven")

    @property
    def adapters(self) -> list[str]:
        """The adapter folders to serve alongside the plain model."""
        return [folder for one in self.served for folder in one.folders]

    def why_not(self) -> str:
        """If the goal is missed: by how much, and which system is nearest to it."""
        choice = self.choice
        if not self.served:
            assert choice.nearest is not None
            unit = "points of accuracy" if choice.shortfall_unit == "points" else "times SISO's throughput"
            return (
                f"the goal cannot be met: it is missed by {choice.shortfall:.2f} {unit}; the nearest system is "
                f"{describe_system(choice.nearest)}"
            )
        worst = max(self.served, key=lambda one: one.verification.loss)
        over = worst.verification.loss - (worst.verification.allowance or 0.0)
        return (
            f"the allowance was exceeded on the test split: {worst.judged.candidate.name} lost "
            f"{worst.verification.loss:.2f} points, {over:.2f} more than allowed; the plain model (SISO) loses nothing; a "
            "larger choosing set (choosing.share, choosing.limit) makes the choice more reliable"
        )


def describe_system(one: Judged) -> str:
    """A phrase about a system: what it is, how fast it is and how much it loses."""
    system = one.candidate
    what = system.describe()
    if system.is_plain:
        return f"{what}, which loses nothing and saves nothing"
    loss = f"{one.best_loss:.2f} points lost"
    if one.bound is not None:
        loss += f", at most {one.bound:.2f}"
    return f"{what}: {1 / system.cost:.2f} times SISO's throughput, {loss}"
