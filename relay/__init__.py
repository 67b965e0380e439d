"""The relay: the process that hands due deliveries to the broker, and the commands for whoever operates it."""
