"""Writes the board for Grafana: `python -m service.dev.board > docs/monitoring/board.json`.

What must stay true: each query asks for what a relay or the API serves, whatever has happened so far. As every relay
shows the same numbers of the ledger, those queries begin with `max without (instance)`.
"""

from __future__ import annotations

import json

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, Threshold, ThresholdsMode

_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")

_Query = prometheus.Dataquery


def board() -> str:
    """The board, as JSON."""
    built = (
        dashboard.Dashboard("Outbox")
        .uid("outbox")
        .description("What relays and API tell of the ledger, of the workers and of themselves.")
        .tags(["outbox"])
        .time("now-1h", "now")
        .refresh("30s")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
    )
    for number in _numbers():
        built = built.with_panel(number)
    for title, graphs in {
        "Deliveries": _deliveries(),
        "Relays and broker": _relays_and_broker(),
        "API and event loops": _api_and_loops(),
    }.items():
        built = built.with_row(dashboard.Row(title))
        for graph in graphs:
            built = built.with_panel(graph)
    return json.dumps(built.build(), cls=JSONEncoder, indent=1) + "\n"


_KEPT_BACK = "unless outbox_queue_paused == 1 unless outbox_queue_limited == 1"
_LATE = f"max without (instance) (outbox_oldest_due_seconds {_KEPT_BACK})"


def _numbers() -> list[stat.Panel]:
    return [
        _number(
            "Due for longest",
            "Of queues that are neither paused nor limited.",
            _query(f"max({_LATE})"),
            red_from=300,
            unit="s",
        ),
        _number(
            "Dead letters", "They wait for a person.", _query(f"sum({_ledger('outbox_dead_letters')})"), red_from=1
        ),
        _number(
            "Alerts",
            "They fire now.",
            _query('count(ALERTS{alertname=~"Outbox.+", alertstate="firing"}) or vector(0)'),
            red_from=1,
        ),
        _number("Relays", "They are connected to PostgreSQL.", _query(_ledger("outbox_relays")), green_from=1),
        _number("Worker processes", "By queue.", _query(_ledger("outbox_worker_processes"), "{{queue}}"), green_from=1),
        _number("Answering", "0 if no relay gets an answer.", _query(_ledger("outbox_up"), "{{system}}"), green_from=1),
    ]


def _deliveries() -> list[timeseries.Panel]:
    return [
        _graph("Completed", "Runs a second.", _query(_runs("completed"), "{{consumer}}"), unit="ops"),
        _graph(
            "Not completed",
            "Runs a second that failed, died, were lost to somebody else, or were given back.",
            _query(f"sum by (outcome) ({_runs('failed|dead|lost|released|unknown')})", "{{outcome}}"),
            unit="ops",
        ),
        _graph(
            "Failing",
            "The share of runs that failed, died or were lost, in 5 minutes.",
            _query("outbox:failed_runs:ratio_rate5m", "{{consumer}}"),
            unit="percentunit",
        ),
        _durations("From commit to effect", "With all attempts between.", "outbox_effect_latency_seconds", "consumer"),
        _durations("From commit to start", "Until the first claim.", "outbox_start_latency_seconds", "consumer"),
        _durations("Runs", "From claim to outcome.", "outbox_run_duration_seconds", "consumer"),
        _graph(
            "Open",
            "Deliveries that are not completed.",
            _query(f"sum without (consumer) ({_ledger('outbox_open_deliveries')})", "{{queue}} {{state}}"),
            stacked=True,
        ),
        _graph("Due for longest", "0 if nothing is due.", _query(_LATE, "{{queue}}"), unit="s"),
        _graph(
            "Waiting",
            "For a retry, for a worker that claims it, for a person, and behind a dead letter of their lane.",
            *(
                _query(f"sum({_ledger(f'outbox_{name}')})", name.replace("_", " "))
                for name in ("retrying_deliveries", "unclaimed_deliveries", "dead_letters")
            ),
            _query(f"sum({_ledger('outbox_blocked_deliveries')}) or vector(0)", "blocked deliveries"),
        ),
    ]


def _relays_and_broker() -> list[timeseries.Panel]:
    return [
        _graph("Handed over", "A second.", _query(_relays("outbox_relay_handed_over_total"), "{{queue}}"), unit="ops"),
        _graph(
            "Lost and refused",
            "A second: deliveries that nobody claimed in time or whose worker was lost, batches that were refused.",
            *(
                _query(f"sum(rate(outbox_relay_{name}_total[$__rate_interval]))", name.replace("_", " "))
                for name in ("redispatched", "workers_lost", "refused")
            ),
            unit="ops",
        ),
        _durations("Batches", "From looking for one to its commit.", "outbox_relay_batch_seconds", "queue"),
        _graph("In the broker", "Messages that wait.", _query(_ledger("outbox_broker_queue_messages"), "{{queue}}")),
        _graph("Purged", "Rows a second.", _query(_relays("outbox_purged_rows_total"), "{{table}}"), unit="ops"),
        _graph(
            "Age of these numbers",
            "Some are kept for 15 s, or for 20 times as long as collecting them took.",
            _query(f"time() - {_ledger('outbox_collected_timestamp_seconds')}", "{{part}}"),
            unit="s",
        ),
    ]


def _api_and_loops() -> list[timeseries.Panel]:
    durations = "http_server_request_duration_seconds"
    return [
        _graph(
            "Requests",
            "A second.",
            _query(f"sum by (route, method) (rate({durations}_count[$__rate_interval]))", "{{method}} {{route}}"),
            unit="reqps",
        ),
        _graph(
            "Statuses",
            "Requests a second; those of none had no response.",
            _query(f"sum by (status) (rate({durations}_count[$__rate_interval]))", "{{status}}"),
            unit="reqps",
        ),
        _graph(
            "Slow requests",
            "99 of 100 are faster.",
            _query(
                f"histogram_quantile(0.99, sum by (le, route) (rate({durations}_bucket[$__rate_interval])))",
                "{{route}}",
            ),
            unit="s",
        ),
        _graph(
            "At work",
            "Requests without a response yet, and connections to PostgreSQL.",
            _query("sum(http_server_active_requests)", "requests"),
            _query("sum by (status) (db_pool_connections)", "connections {{status}}"),
        ),
        _graph(
            "Failed afterwards",
            "Background tasks a second that failed after the response.",
            _query(
                "sum by (route) (rate(http_server_background_failures_total[$__rate_interval])) or vector(0)",
                "{{route}}",
            ),
            unit="ops",
        ),
        _graph(
            "Event loops",
            "How long code held one up, at most in 10 s.",
            _query(_ledger("event_loop_lag_seconds"), "{{process}}"),
            unit="s",
        ),
    ]


def _ledger(name: str) -> str:
    return f"max without (instance) ({name})"


def _runs(outcomes: str) -> str:
    return _ledger(f'rate(outbox_runs_total{{outcome=~"{outcomes}"}}[$__rate_interval])')


def _relays(name: str) -> str:
    return f"sum without (instance) (rate({name}[$__rate_interval]))"


def _query(expression: str, legend: str = "__auto") -> _Query:
    return _Query().expr(expression).legend_format(legend).range()


def _number(
    title: str,
    meaning: str,
    query: _Query,
    *,
    red_from: float | None = None,
    green_from: float | None = None,
    unit: str = "none",
) -> stat.Panel:
    low, high = ("green", "red") if green_from is None else ("red", "green")
    steps = [Threshold(color=low), Threshold(color=high, value=red_from or green_from)]
    return (
        stat.Panel()
        .title(title)
        .description(meaning)
        .datasource(_SOURCE)
        .span(4)
        .height(4)
        .unit(unit)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .with_target(query.ref_id("A"))
    )


def _graph(title: str, meaning: str, *queries: _Query, unit: str = "none", stacked: bool = False) -> timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    panel = (
        timeseries.Panel()
        .title(title)
        .description(meaning)
        .datasource(_SOURCE)
        .span(8)
        .height(7)
        .unit(unit)
        .min(0)
        .fill_opacity(40 if stacked else 10)
        .legend(legend.display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM))
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    for ref, query in zip("ABCD", queries, strict=False):
        panel = panel.with_target(query.ref_id(ref))
    return panel


def _durations(title: str, meaning: str, metric: str, by: str) -> timeseries.Panel:
    """Half of them, and 99 of 100, are shorter."""
    rate = (_ledger if by == "consumer" else str)(f"rate({metric}_bucket[$__rate_interval])")
    counted = f"sum by (le, {by}) ({rate})"
    queries = [
        _query(f"histogram_quantile({quantile}, {counted})", f"{{{{{by}}}}} {label}")
        for quantile, label in ((0.5, "p50"), (0.99, "p99"))
    ]
    return _graph(title, meaning, *queries, unit="s")


if __name__ == "__main__":
    print(board(), end="")
