"""Commands: generate, score, plan, doctor, make_checkpoint. ``options`` is what they share.

A command's module imports torch and transformers only once its options are parsed, so that a wrong configuration is
refused within a second.
"""
