"""The price of a million answers, from the measured throughput of a plan and the price of an hour of its hardware."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from revmux.errors import UserError

MILLION = 1_000_000
SECONDS_PER_HOUR = 3600


def price_per_million(inputs_per_second: float, price_per_hour: float) -> float:
    """The price of a million answers.

    Args:
        inputs_per_second: throughput of the hardware, above 0.
        price_per_hour: price of an hour of the hardware, in any currency.
    """
    return price_per_hour * MILLION / (SECONDS_PER_HOUR * inputs_per_second)


def price_table(folder: str, price_per_hour: float) -> str:
    """One line for the plain model and one per served system of a plan: inputs per second, and the price of a million answers.

    The throughput is that of the model alone with full passes, on the hardware on which the plan was made. A server adds the
    cost of its requests.

    Args:
        folder: folder of the plan, or its ``plan.json``.
        price_per_hour: price of an hour of that hardware, in any currency.

    Raises:
        UserError: there is no plan, or nothing in it was timed; or the price is not above 0.
    """
    if price_per_hour <= 0:
        raise UserError(f"price is {price_per_hour:g}; choose more than 0, such as 2.5 per hour")
    file = Path(folder)
    file = file if file.is_file() else file / "plan.json"
    if not file.is_file():
        raise UserError(f"{folder} has no plan.json; name the folder of a plan, which `revmux plan` prints at its end")
    plan: dict[str, Any] = json.loads(file.read_text())
    rate = plan.get("siso_inputs_per_second")
    if rate is None:
        raise UserError(
            f"{file} has no measured throughput; make the plan again with --measure.throughput_inputs above 0, on the hardware "
            "whose price you name"
        )
    ratios = {system["name"]: system["throughput_ratio"] for system in plan["systems"]}
    served = {system["name"]: ratios.get(system["name"]) for system in plan["served"]}
    machine = plan["meta"]["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    lines = [
        f"measured on {where}, at {price_per_hour:g} per hour; the model alone, with full passes",
        f"{'inputs per second':>18} {'a million answers':>18}  system",
    ]
    for name, ratio in {"plain model": 1.0, **served}.items():
        if ratio is not None and (name == "plain model" or ratio != 1.0):
            speed = rate * ratio
            lines.append(f"{speed:>18,.1f} {price_per_million(speed, price_per_hour):>18,.2f}  {name}")
    if len(lines) == 3:
        lines.append("the plan serves the plain model, so nothing is saved")
    return "\n".join(lines)
