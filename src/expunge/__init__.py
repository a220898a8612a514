"""Expunge: make a trained model forget, measure whether it did, and put a name under the answer."""

__version__ = "0.1.0"
