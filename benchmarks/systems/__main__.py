"""python -m benchmarks.systems"""

from __future__ import annotations

from pathlib import Path

from benchmarks.systems.accuracy import Budget, measure

if __name__ == "__main__":
    measure(Budget(), Path("runs/systems"))
