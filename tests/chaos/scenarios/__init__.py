"""Every attack, in the order of the sweep; importing this registers them."""

from tests.chaos.scenarios import network, operators, planted, poison, postgres, processes, valkey  # noqa: F401
