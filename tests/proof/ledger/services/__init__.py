"""Two services, each with a database of its own: one forwards its events, the other accepts them."""
