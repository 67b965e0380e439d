"""Refusals of the orders domain."""

from __future__ import annotations

from service.errors import BusinessError


class UnknownProductError(BusinessError):
    status = 404
    code = "unknown_product"
    title = "There is no such product"


class UnknownOrderError(BusinessError):
    status = 404
    code = "unknown_order"
    title = "There is no such order"


class DuplicateProductError(BusinessError):
    status = 422
    code = "duplicate_product"
    title = "An order has one line for each product"
