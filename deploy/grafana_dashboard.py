"""Write the Grafana dashboard of the server: ``python deploy/grafana_dashboard.py``.

The file is part of the Helm chart, because a chart can only include its own files. Grafana imports it as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableOption, VariableRefresh
from grafana_foundation_sdk.models.prometheus import QueryEditorMode

FILE = Path(__file__).parent / "helm/revmux/dashboards/revmux.json"
SOURCES = {"/metrics of the server": "revmux", "Ray's metrics agents": "ray_revmux"}
"""Where Prometheus can get the metrics, with the first part of their names there."""

_DATA = DataSourceRef(type_val="prometheus", uid="${datasource}")
_CLASSIFICATIONS = 'route=~"/|/predict|/classify|/tasks/.*|/v2/models/.*/infer"'

_QUEUE, _PASS = 'step="queue"', 'step="pass"'


class Panel(NamedTuple):
    """A chart.

    Attributes:
        title: what the chart shows.
        description: how to read it.
        unit: one of Grafana's units.
        queries: PromQL expressions with the legends of their series.
        stacked: whether the series add up to a total.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    stacked: bool = False


def _rate(name: str, by: str = "", *matchers: str, labels: str = 'task=~"$task", replica=~"$replica"') -> str:
    """The increase of a counter per second, summed over all other labels than those of ``by``."""
    chosen = ", ".join([*matchers, labels])
    return f"sum by ({by}) (rate(${{metrics}}_{name}{{{chosen}}}[$__rate_interval]))"


def _http(name: str, by: str) -> str:
    """The same for a counter of classification requests. Their tasks are not known before their bodies are read."""
    return _rate(name, by, _CLASSIFICATIONS, labels='replica=~"$replica"')


def _share(part: str, whole: str, by: str = "task") -> str:
    return f"{_rate(part, by)} / {_rate(whole, by)}"


ROWS = {
    "Load": [
        Panel(
            "Requests",
            "Classification requests by the status of their reply. 429 means that the queue was full.",
            "reqps",
            [(_http("http_requests_total", "status"), "{{status}}")],
            stacked=True,
        ),
        Panel(
            "Inputs",
            "Answered inputs by task. A request has one or more inputs.",
            "ops",
            [(_rate("inputs_total", "task"), "{{task}}")],
            stacked=True,
        ),
        Panel(
            "Waiting inputs",
            "The depth of the queues. At the limit, requests are refused.",
            "short",
            [
                ('sum by (task) (${metrics}_queue_inputs{task=~"$task", replica=~"$replica"})', "{{task}}"),
                ('max(${metrics}_queue_limit{replica=~"$replica"})', "limit per task and replica"),
            ],
        ),
        Panel(
            "Inputs without an answer",
            "Rejected: the queue was full. Expired: the deadline passed in the queue. Cancelled: the client disconnected. "
            "Failed: the model failed.",
            "ops",
            [(_rate(f"{name}_total"), name) for name in ("rejected", "expired", "cancelled", "failed")],
            stacked=True,
        ),
    ],
    "Multiplexing": [
        Panel(
            "Inputs by group width",
            "How many inputs shared a pass through the upper layers. 1 is the plain model or an exit head.",
            "ops",
            [(_rate("inputs_total", "width"), "N = {{width}}")],
            stacked=True,
        ),
        Panel(
            "Mean group width",
            "Inputs per group. It grows with the load.",
            "none",
            [(_share("group_width_sum", "group_width_count"), "{{task}}")],
        ),
        Panel(
            "Inputs by stage",
            "The stage of the ladder that answered. 0 is the plain model.",
            "ops",
            [(_rate("ladder_inputs_total", "task, stage"), "{{task}}, stage {{stage}}")],
            stacked=True,
        ),
        Panel(
            "Inputs by method",
            "The method of the last group of an input. siso is the plain model.",
            "ops",
            [(_rate("method_inputs_total", "method"), "{{method}}")],
            stacked=True,
        ),
    ],
    "Latency": [
        Panel(
            "Time of a request",
            "From its first byte to the last byte of its reply.",
            "s",
            [
                (f"histogram_quantile({quantile}, {_http('http_request_seconds_bucket', 'le')})", name)
                for quantile, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
            ],
        ),
        Panel(
            "Mean time of a step",
            "Per input for tokenize and queue, per forward pass for the other steps. pass is the whole forward pass.",
            "s",
            [(_share("step_seconds_sum", "step_seconds_count", "step"), "{{step}}")],
        ),
        Panel(
            "Time in the queue",
            "From queueing to the start of the forward pass, 95 % of inputs wait less.",
            "s",
            [
                (f"histogram_quantile(0.95, {_rate('step_seconds_bucket', 'le, task', _QUEUE)})", "{{task}}"),
            ],
        ),
        Panel(
            "Busy model",
            "The share of time in which the model of a replica runs a pass.",
            "percentunit",
            [(_rate("step_seconds_sum", "replica", _PASS), "{{replica}}")],
        ),
    ],
    "Quality and cost": [
        Panel(
            "Fall-back",
            "The share of inputs whose answer was not confident enough, so that the plain model answered.",
            "percentunit",
            [(_share("fell_back_total", "inputs_total"), "{{task}}")],
        ),
        Panel(
            "Agreement with the plain model",
            "The share of audited inputs with the plain model's label. It is empty unless the setting audit is above 0.",
            "percentunit",
            [(_share("agreed_total", "audited_total"), "{{task}}")],
        ),
        Panel(
            "Audited inputs",
            "Inputs of adapters that ran through the plain model too. The agreement is uncertain if they are few.",
            "ops",
            [(_rate("audited_total", "task"), "{{task}}")],
        ),
        Panel(
            "Padding",
            "The share of computed tokens that are padding.",
            "percentunit",
            [(f"1 - {_share('tokens_total', 'padded_tokens_total')}", "{{task}}")],
        ),
    ],
}


def _chart(panel: Panel) -> timeseries.Panel:
    made = timeseries.Panel().title(panel.title).description(panel.description).unit(panel.unit).datasource(_DATA)
    made = made.min(0).span(6).height(8).fill_opacity(15)
    if panel.unit == "percentunit":
        made = made.max(1)
    if panel.stacked:
        made = made.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for place, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + place))
        made = made.with_target(query.range().editor_mode(QueryEditorMode.CODE).datasource(_DATA))
    return made


def _values_of(label: str, metric: str) -> dashboard.QueryVariable:
    """A choice among the values of a label."""
    found = dashboard.QueryVariable(label).label(label).datasource(_DATA)
    found = found.query(f"label_values(${{metrics}}_{metric}, {label})")
    found = found.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).multi(True).include_all(True).all_value(".*")
    return found.current(VariableOption(text="All", value="$__all", selected=True))


def build() -> str:
    """Return the dashboard in Grafana's JSON."""
    first = next(iter(SOURCES.items()))
    made = (
        dashboard.Dashboard("RevMUX")
        .uid("revmux")
        .description("Requests, group widths, latency, fallback and agreement of the servers of RevMUX.")
        .tags(["revmux", "ray"])
        .timezone("browser")
        .time("now-1h", "now")
        .refresh("30s")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            dashboard.CustomVariable("metrics")
            .label("metrics from")
            .values(", ".join(f"{name} : {value}" for name, value in SOURCES.items()))
            .current(VariableOption(text=first[0], value=first[1], selected=True))
        )
        .with_variable(_values_of("task", "queue_inputs"))
        .with_variable(_values_of("replica", "queue_limit"))
    )
    for title, panels in ROWS.items():
        made = made.with_row(dashboard.Row(title))
        for panel in panels:
            made = made.with_panel(_chart(panel))
    page = made.build()
    for number, chart in enumerate(page.panels or [], start=1):
        chart.id_val = number
    return json.dumps(json.loads(JSONEncoder().encode(page)), indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(build())
