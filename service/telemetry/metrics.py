"""Every metric that is served, and how a page of them is rendered.

What must stay true: the values of each label are few, whatever comes from outside; and nothing here is imported, nor
`prometheus_client` with it, by a process that serves no metrics.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from prometheus_client.metrics_core import Metric as Family

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metric(NamedTuple):
    """What a metric is. Its labels stand in one string."""

    name: str
    kind: type[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]
    labels: str
    meaning: str


class Durations(NamedTuple):
    """A histogram's value: upper bounds in seconds, how many fell below each but not the one before, and their sum."""

    bounds: Sequence[float]
    buckets: Sequence[int]
    seconds: float


class Sample(NamedTuple):
    """A metric's value for these values of its labels."""

    name: str
    labels: tuple[str, ...]
    value: float | Durations


_GAUGE, _COUNTER, _HISTOGRAM = GaugeMetricFamily, CounterMetricFamily, HistogramMetricFamily

METRICS = (
    Metric("outbox_up", _GAUGE, "system", "Whether postgresql or broker answered the relay"),
    Metric("outbox_relays", _GAUGE, "", "Relays that are connected"),
    Metric("outbox_worker_processes", _GAUGE, "queue", "Worker processes that take from the queue"),
    Metric("outbox_broker_queue_messages", _GAUGE, "queue", "Messages that wait in the broker"),
    Metric("outbox_oldest_due_seconds", _GAUGE, "queue", "For how long the delivery has been due that is due longest"),
    Metric("outbox_queue_paused", _GAUGE, "queue", "Whether the queue is paused; * stands for all of them"),
    Metric("outbox_queue_limited", _GAUGE, "queue", "Whether the queue has a limit"),
    Metric("outbox_open_deliveries", _GAUGE, "queue consumer state", "Deliveries that are not completed"),
    Metric("outbox_retrying_deliveries", _GAUGE, "queue consumer", "Pending deliveries that have failed before"),
    Metric("outbox_unclaimed_deliveries", _GAUGE, "queue consumer", "Handed over three times or more, never claimed"),
    Metric("outbox_dead_letters", _GAUGE, "queue consumer", "Dead letters that wait for a person"),
    Metric("outbox_parked_deliveries", _GAUGE, "queue consumer", "Pending ones that wait for their turn in a lane"),
    Metric("outbox_blocked_lanes", _GAUGE, "queue consumer", "Lanes that stand for a dead letter"),
    Metric("outbox_blocked_deliveries", _GAUGE, "queue consumer", "Deliveries that wait in them"),
    Metric("outbox_blocked_seconds", _GAUGE, "queue consumer", "For how long the first of them has stood"),
    Metric("outbox_stranded_lanes", _GAUGE, "", "Lanes in which something waits for nothing"),
    Metric("outbox_collected_timestamp_seconds", _GAUGE, "part", "When this part of the page was collected"),
    Metric("outbox_collect_duration_seconds", _GAUGE, "part", "How long the last try to collect this part took"),
    Metric("outbox_runs_total", _COUNTER, "queue consumer outcome", "Runs of consumers, by what became of them"),
    Metric("outbox_run_duration_seconds", _HISTOGRAM, "queue consumer", "From claim to outcome"),
    Metric("outbox_start_latency_seconds", _HISTOGRAM, "queue consumer", "From commit, or due, to the first claim"),
    Metric("outbox_effect_latency_seconds", _HISTOGRAM, "queue consumer", "From commit, or due, to the effect"),
    Metric("outbox_relay_handed_over_total", _COUNTER, "queue", "Deliveries that this relay has handed over"),
    Metric("outbox_relay_redispatched_total", _COUNTER, "queue", "Those of them that nobody had claimed in time"),
    Metric("outbox_relay_refused_total", _COUNTER, "queue", "Batches that the broker refused for the queue's sake"),
    Metric("outbox_relay_workers_lost_total", _COUNTER, "queue", "Deliveries whose worker's lease had ended"),
    Metric("outbox_relay_batch_seconds", _HISTOGRAM, "queue", "How long a batch took, with its commit"),
    Metric("outbox_purged_rows_total", _COUNTER, "table", "Rows that this relay has purged"),
    Metric("outbox_purge_failures_total", _COUNTER, "", "Purges of this relay that failed"),
    Metric("http_server_request_duration_seconds", _HISTOGRAM, "method route status", "Until the response was sent"),
    Metric("http_server_active_requests", _GAUGE, "method", "Requests whose response is not sent yet"),
    Metric("http_server_background_failures_total", _COUNTER, "route", "Failures after the response was sent"),
    Metric("db_pool_connections", _GAUGE, "status", "Connections to PostgreSQL: used, idle, or free to be opened"),
    Metric("db_pool_timeouts_total", _COUNTER, "process", "Waits for a connection of the pool that were given up"),
    Metric("event_loop_lag_seconds", _GAUGE, "process", "The longest that the event loop was held up in 10 s"),
)


def render(samples: Iterable[Sample]) -> bytes:
    """The page, in Prometheus' text format."""
    return generate_latest(_Page(samples))


class _Page:
    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = list(samples)

    def collect(self) -> Iterator[Family]:
        families = {each.name: each.kind(each.name, each.meaning, labels=each.labels.split()) for each in METRICS}
        for name, labels, value in self._samples:
            family = families[name]
            if isinstance(family, HistogramMetricFamily):
                assert isinstance(value, Durations)
                bounds = [*map(str, map(float, value.bounds)), "+Inf"]
                family.add_metric(labels, list(zip(bounds, accumulate(value.buckets), strict=True)), value.seconds)
            else:
                assert not isinstance(value, Durations)
                family.add_metric(labels, value)
        return (each for each in families.values() if each.samples)
