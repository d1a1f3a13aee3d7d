"""The errors a user can meet. Everything else that escapes is a bug of ours."""


class DsRingError(Exception):
    """Base of every error this package raises on purpose."""


class UserError(DsRingError, ValueError):
    """Something the user can put right; the launch scripts exit with 2."""


class ConfigError(UserError):
    """A run configuration that cannot work: says the value, the limit it breaks and a fix."""


class InputError(UserError):
    """Tokens, masks or text that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that is incomplete, damaged, or would run code of its own."""


class UnsupportedModelError(UserError):
    """A model whose attention cannot be sharded by injection; names the class and the reason."""


class NumericsError(DsRingError, ArithmeticError):
    """A model gave NaN or infinity; names the layer and the ranks it began on."""


class TransportError(DsRingError, RuntimeError):
    """Ranks disagree on what to move, or a peer did not answer."""
