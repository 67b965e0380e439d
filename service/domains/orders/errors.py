"""Refusals of the orders domain."""

from __future__ import annotations

from service.errors import BusinessError

__all__ = ["DuplicateProductError", "UnknownOrderError", "UnknownProductError"]


class UnknownProductError(BusinessError):
    """There is no such product."""

    status = 404
    code = "unknown_product"
    title = "There is no such product"


class UnknownOrderError(BusinessError):
    """There is no such order."""

    status = 404
    code = "unknown_order"
    title = "There is no such order"


class DuplicateProductError(BusinessError):
    """Two lines want the same product."""

    status = 422
    code = "duplicate_product"
    title = "An order has one line for each product"
