"""Exact spectral entropy of a network's representations, cheap enough to leave on while it trains."""
