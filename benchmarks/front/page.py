"""The tables of the front: every system per task, the ablation, and what a plan ships for each allowance."""

from __future__ import annotations

from typing import Any

from revmux.methods import method_class

Row = dict[str, Any]


def front_words(result: Row) -> dict[str, str]:
    """Return the text for each mark."""
    rows, meta = result["rows"], result["meta"]
    tables = {name: [row for row in rows if row["table"] == name] for name in ("front", "ablation", "plan")}
    sizes = ", ".join(
        f"{name} {data['train']:,} / {data['choosing']:,} / {data['test']:,}" for name, data in meta["data"].items()
    )
    commits = "; ".join(
        f"{', '.join(f'`{commit[:8]}`' for commit in _commits(rows, name, data, meta))} ({name})"
        for name, data in meta["data"].items()
    )
    how = (
        f"Inputs for training / choosing / test: {sizes}. Accuracy is measured on the test split over 10 groupings; ± is the "
        f"spread over seeds, and a row without it has one seed. {meta['machine']['cores']} cores, torch "
        f"{meta['versions']['torch']}; measured at commits {commits}."
    )
    return {
        "front": _summary(tables["plan"]) + f"\n\n{how}\n",
        "front-systems": "\n\n".join(_systems(task, tables["front"]) for task in _tasks(tables["front"]))
        + f"\n\n{how}\n",
        "front-ablation": _ablation(tables["ablation"], tables["front"]) + "\n",
        "front-plans": _plans(tables["plan"]) + "\n",
    }


def _commits(rows: list[Row], task: str, data: Row, meta: Row) -> list[str]:
    """Return the commits at which the adapters of a task were measured, and that of everything else."""
    last = data.get("commit") or meta["commit"] or "unknown"
    return sorted({last, *(commit for row in rows if row["task"] == task for commit in row.get("commits", ()))})


def _tasks(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["task"] for row in rows))


def _points(row: Row) -> str:
    lost = 100 * (row["siso_accuracy"] - row["accuracy_mean"])
    spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.1f}"
    return f"{lost:.1f}{spread}"


def _systems(task: str, rows: list[Row]) -> str:
    """Return the table of a task, cheapest system last."""
    own = [row for row in rows if row["task"] == task]
    own.sort(key=lambda row: -(row["cost_counted"] or 1 / row["throughput_ratio"]))
    lines = [
        f"**{task}**",
        "",
        "| system | N | cost, counted | throughput, measured | accuracy | points lost | in served groups | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in own:
        cost = "–" if row["cost_counted"] is None else f"{row['cost_counted']:.2f}"
        served = f"{100 * row['accuracy_served']:.1f}" if row.get("accuracy_served") is not None else "–"
        lines.append(
            f"| {row['title']} | {row['num_inputs']} | {cost} | {row['throughput_ratio']:.2f}× "
            f"| {100 * row['accuracy_mean']:.1f} | {_points(row)} | {served} | {row['seeds']} |"
        )
    return "\n".join(lines)


def _ablation(rows: list[Row], front: list[Row]) -> str:
    """Return the table of the ablation, below the whole recipe."""
    lines = [
        "| recipe (RevMUX, N = 4, l = 3) | accuracy | points lost | agreement with SISO | seeds |",
        "|---|---|---|---|---|",
    ]
    whole = [
        {**row, "title": "strong"}
        for row in front
        if rows
        and (row["task"], row["method"], row["num_inputs"], row["prefill_layers"]) == (rows[0]["task"], "revmux", 4, 3)
    ]
    for row in [*whole, *rows]:
        lines.append(
            f"| {row['title']} | {100 * row['accuracy_mean']:.1f} | {_points(row)} | {100 * row['siso_agreement']:.1f} "
            f"| {row['seeds']} |"
        )
    return "\n".join(lines)


def _stages(row: Row) -> str:
    """Return the stages of a served system: ``exit head, layer 2 → revmux N=4 l=3 → plain model``."""
    names = []
    for stage in row["stages"]:
        if method_class(stage["method"]).is_plain:
            return "plain model"
        lora = " with LoRA" if stage["options"].get("lora_rank") else ""
        if stage["method"] in ("exit-head", "skip-only"):
            name = "exit head" if stage["method"] == "exit-head" else "skip-only"
            names.append(f"{name}{lora}, layer {stage['options']['layer']}")
        else:
            names.append(f"{stage['method']}{lora} N={stage['num_inputs']} l={stage['prefill_layers']}")
    last = row["stages"][-1]["threshold"] if row["stages"] else None
    plain = ["plain model"] if not row["stages"] or last else []
    return " → ".join([*names, *plain])


def _summary(rows: list[Row]) -> str:
    """Return what a plan over all systems ships per allowance, for the first page."""
    lines = [
        "| task | allowance, points | what the plan chooses | throughput, measured | points lost on the test split | outcome |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["systems"] == "all systems" and row["allowance"] in (0.5, 1.0, 3.0):
            lines.append(
                f"| {row['task']} | {row['allowance']:g} | {_stages(row)} | {row['throughput_ratio'] or 1:.2f}× "
                f"| {row['verified_loss']:.2f} ({row['verified_lower']:.2f} to {row['verified_upper']:.2f}) | {row['verdict']} |"
            )
    return "\n".join(lines)


def _plans(rows: list[Row]) -> str:
    """Return every plan, with all systems and without multiplexing."""
    lines = [
        "| task | allowance | systems | served | falls back | cost, counted | throughput | promised loss, upper bound "
        "| verified loss (interval) | outcome |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        bound = "–" if row["promised_bound"] is None else f"{row['promised_bound']:.2f}"
        lines.append(
            f"| {row['task']} | {row['allowance']:g} | {row['systems']} | {_stages(row)} | {row['fallback']:.0%} "
            f"| {row['cost_counted']:.2f} | {row['throughput_ratio'] or 1:.2f}× | {row['promised_loss']:.2f}, {bound} "
            f"| {row['verified_loss']:.2f} ({row['verified_lower']:.2f} to {row['verified_upper']:.2f}) | {row['verdict']} |"
        )
    return "\n".join(lines)
