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


class OutOfMemory(DsRingError):
    """A launched run ended because a rank's memory did not hold what was asked of it."""


class OutputError(DsRingError):
    """A result, or a file beside it, could not be written: a full disk, a device that fails."""


class LaunchError(DsRingError):
    """A launched run failed; ``reason`` is one line, the error's text more."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class TransportError(DsRingError, RuntimeError):
    """Ranks disagree on what to move, a peer did not answer, or it failed at what ranks do together."""


def reason_of(error: BaseException) -> str:
    """What an error says, or its kind where it says nothing."""
    return str(error) or type(error).__name__


class DisagreementError(UserError, TransportError):
    """Ranks were given different things; names the first of them and a rank that has another than rank 0."""


def in_one_line(error: BaseException) -> str:
    """What another library's ``error`` says, with its kind where that says more than the words."""
    words = " ".join(str(error).split())
    return words if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {words}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: PyTorch's allocators, CUDA's driver, its libraries and the host's
    each have words of their own for it."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def has_lost_a_rank(error: BaseException) -> bool:
    """Whether ``error`` is what comes of another rank's end, which has a cause of its own: ours, PyTorch's of a process
    group, or gloo's, which have no type."""
    if isinstance(error, TransportError):
        return not isinstance(error, UserError)
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "timeout caused pair closure", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
