"""The relay: the process that hands due outbox rows to the broker, and the commands for whoever operates it."""
