"""Lanes: deliveries that take effect one at a time, in the order of their commits."""
