"""Prices of every tensor under every spec, from one forward and one backward pass."""

from epic_quant.prices.pricing import CANDIDATES, ROUNDED_ERROR, needed_nbytes, price

__all__ = ["CANDIDATES", "ROUNDED_ERROR", "needed_nbytes", "price"]
