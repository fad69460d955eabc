"""Let HAProxy send the requests of one task to one replica, while that replica is not busy.

Inputs of a task form groups only within a replica, and a replica may have to load a task for its first request. Each task
therefore has its own order of the replicas (rendezvous hashing), which stays the same for the others when a replica comes
or goes. A request goes to the first one that is not busy: the task's own replica may hold more requests than the others do
on average, because it answers many at once and is then empty, and others help only if they hold fewer. If all are busy, and
for requests that name no task, or several, it is the replica with the fewest requests. Uses the standard library alone, like
:mod:`serve_app.haproxy`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "REVMUX_PROXY_BUSY_REQUESTS"
"""Variable with the number of requests from which a replica is busy. Without it, or with 0, tasks have no replica of their own."""

SCRIPT = "tasks.lua"

OWN_SHARE, HELP_SHARE = 1.5, 0.75
"""Requests that the own replica of a task may hold, and those up to which another one helps, relative to the mean per replica.

A replica that runs its requests in large passes holds between none and twice the mean, with no more work than the others.
"""

_SCRIPT = """\
local BUSY = %(busy)d
local REPLICAS = {%(replicas)s}

local function task_of(txn)
    local path = txn.sf:path()
    local task = path:match("/tasks/([^/]+)/predict$") or path:match("/v2/models/([^/]+)/infer$")
    if task or txn.sf:method() ~= "POST" then
        return task
    end
    local key = path:match("/classify$") and "$.model" or "$.task"
    return txn.sc:json_query(txn.sf:req_body(), key)
end

core.register_action("choose_replica", {"http-req"}, function(txn, backend)
    local task = task_of(txn)
    if not task or task == "" then
        return
    end
    local replicas, total = {}, 0
    for _, name in ipairs(REPLICAS[backend]) do
        if txn.f:srv_is_up(name) == 1 then
            local held = txn.f:srv_conn(name)
            total = total + held
            table.insert(replicas, {name = name, held = held, rank = txn.c:xxh64(name .. "/" .. task)})
        end
    end
    table.sort(replicas, function(one, other) return one.rank < other.rank end)
    local mean = (total + 1) / #replicas
    for place, replica in ipairs(replicas) do
        local share = place == 1 and %(own_share)g or %(help_share)g
        if replica.held + 1 <= math.max(BUSY, share * mean) then
            txn:set_var("txn.replica", replica.name)
            return
        end
    end
end, 1)
"""
_SERVER = re.compile(r"^ *server (\S+) (?!.* backup\b)", re.MULTILINE)
_OWN = re.compile(
    rf"^ *(lua-load-per-thread \S*/{re.escape(SCRIPT)}|http-request lua\.choose_replica|use-server \S+ if \{{ var\(txn\.replica\)).*\n",
    re.MULTILINE,
)


def with_affinity(sections: Iterable[str], folder: Path, busy: int) -> str:
    """Return a configuration in which HAProxy chooses the replica by task, and write the script that does so.

    Args:
        sections: the sections of HAProxy's configuration, perhaps with an earlier choice.
        folder: folder for the script.
        busy: number of requests from which a replica is busy.
    """
    replicas: dict[str, list[str]] = {}
    edited = []
    for section in sections:
        section = _OWN.sub("", section)
        title, _, lines = section.partition("\n")
        kind, _, name = title.strip().partition(" ")
        if kind == "global":
            lines = f"    lua-load-per-thread {folder / SCRIPT}\n{lines}"
        elif kind == "backend" and (servers := _SERVER.findall(lines)):
            replicas[name] = servers
            chosen = [f'    use-server {server} if {{ var(txn.replica) -m str "{server}" }}\n' for server in servers]
            lines = f"    http-request lua.choose_replica {name}\n{''.join(chosen)}{lines}"
        edited.append(f"{title}\n{lines}")
    # A JSON string is a Lua string, too, for the names that HAProxy accepts.
    table = ", ".join(
        f"[{json.dumps(name)}] = {{{', '.join(json.dumps(server) for server in servers)}}}"
        for name, servers in replicas.items()
    )
    settings = {"busy": busy, "own_share": OWN_SHARE, "help_share": HELP_SHARE, "replicas": table}
    (folder / SCRIPT).write_text(_SCRIPT % settings)
    return "".join(edited)
