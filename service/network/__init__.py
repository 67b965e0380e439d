"""How to reach other servers: what may stand in a URL, how soon silence is noticed, and whom TLS trusts."""
