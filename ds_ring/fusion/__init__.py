"""Fusion for transformers' own layers: their forward is traced, and neighbouring operations become one."""
