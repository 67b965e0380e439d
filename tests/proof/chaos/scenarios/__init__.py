"""Every attack, in the order of the sweep; importing this registers them."""

from tests.proof.chaos.scenarios import (  # noqa: F401
    batches,
    failover,
    limits,
    network,
    operators,
    order,
    planted,
    poison,
    postgres,
    processes,
    rabbitmq,
    recovery,
    schedules,
    valkey,
)
