"""The worker process, under the stock Dramatiq CLI: `dramatiq service.worker:setup_broker`."""

from service.worker.process import build, setup_broker

__all__ = ["build", "setup_broker"]
