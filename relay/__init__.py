"""Relay: a store-and-forward chat relay."""

__version__ = "0.1.0"
