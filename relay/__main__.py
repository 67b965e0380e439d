"""`python -m relay`, where the `outbox` script is not on the path."""

from relay.cli.app import main

main()
