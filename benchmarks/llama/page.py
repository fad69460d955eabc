"""The texts of the pretrained LLaMA: systems, ladders, prompts, and what their constant prefix saves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.llama.answers import answer_words
from benchmarks.llama.tables import ladder_words, system_words
from benchmarks.rows import verdict


def llama_words(result: dict[str, Any]) -> dict[str, str]:
    """Return the texts for the page's marks."""
    meta, rows = result["meta"], result["rows"]
    of_systems = sorted({commit for row in rows for commit in row.get("commits", ())})
    commits = {part: [commit] for part, commit in meta["commits"].items()} | {"systems": of_systems}
    machine = {part: _machine(meta, found) for part, found in commits.items()}
    tables = {"prompt": _prompt_table, "prefix": _prefix_table}
    measured = [row for row in rows if "why" not in row or row["kind"] in ("siso", "systems", "ladders")]
    found = {kind: [row for row in measured if row["kind"] == kind] for kind in (*tables, "siso", "systems", "ladders")}
    words = {f"llama-{name}": "Not measured yet.\n" for name in ("prompts", "prefix", "systems", "ladders", "answers")}
    for kind, name in (("prompt", "prompts"), ("prefix", "prefix")):
        if found[kind]:
            words[f"llama-{name}"] = tables[kind](found[kind], machine[name])
    if found["systems"]:
        words |= {
            "llama-systems": system_words([*found["siso"], *found["systems"]], meta["data"])
            + f" {machine['systems']}.\n",
            "llama-ladders": ladder_words(found["ladders"]),
            "llama-answers": answer_words(found["systems"]),
        }
    return words


def _machine(meta: dict[str, Any], commits: Sequence[str | None]) -> str:
    names = ", ".join(f"`{(commit or 'unknown')[:8]}`" for commit in commits)
    word = "commit" if len(commits) == 1 else "commits"
    return f"{meta['machine']['cores']} cores, torch {meta['versions']['torch']}, {word} {names}"


def _prompt_table(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        "| task | prompt | selection, plain / calibrated | dev, plain | dev, calibrated | dev, largest class | constant tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    for row in sorted(rows, key=lambda row: tasks.index(row["task"])):
        rivals = [other["selection_calibrated"] for other in rows if other["task"] == row["task"]]
        chosen = "**" if row["selection_calibrated"] == max(rivals) else ""
        lines.append(
            f"| {row['task']} | {chosen}`{row['prompt']}`{chosen} | {row['selection']:.1%} / {row['selection_calibrated']:.1%} | "
            f"{row['dev']:.1%} | {row['dev_calibrated']:.1%} | {row['dev_majority']:.1%} | {row['constant_tokens']} |"
        )
    sizes = ", ".join(dict.fromkeys(f"{row['task']} {row['selection_inputs']} and {row['dev_inputs']}" for row in rows))
    words = (
        f"smollm2-135m in {rows[0]['dtype']}, without any training. Inputs of the selection set and of dev: {sizes}. The selection set "
        f"fits the bias and chooses the prompt (bold). {machine}."
    )
    return "\n".join(lines) + f"\n\n{words}\n"


def _prefix_table(rows: list[dict[str, Any]], machine: str) -> str:
    lines = [
        "| system | operations saved, counted | time saved, measured | throughput | measured / counted (min–max) | target | result |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['title']} | {row['saved_counted']:.1%} | {row['saved_measured']:.1%} | {row['throughput_ratio']:.2f}× | "
        f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f}) | ≥ {row['target']:g} | {verdict(row)} |"
        for row in rows
    ]
    first = rows[0]
    words = (
        f"smollm2-135m in float32 with the prompt `{first['prompt']}` on SST-2: {first['prefix']} of {first['tokens']} tokens (mean) are "
        f"constant. The same model with and without the prefix, {first['pairs']} pairs of runs. {machine}."
    )
    return "\n".join(lines) + f"\n\n{words}\n"
