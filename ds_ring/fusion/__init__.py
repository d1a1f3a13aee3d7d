"""Fusion for stock transformers layers: their own forward, traced, with neighbouring operations put together."""
