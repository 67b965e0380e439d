"""Two releases of one domain, for the tests in which processes of both run at the same time."""
