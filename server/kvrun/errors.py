"""Every error this package raises on purpose, in one tree. Messages say what was asked, what was found, what to do next."""


class KvrunError(Exception):
    """Something that has a name and, when it ends the process, a fixed exit code."""

    exit_code = 70


class ConfigError(KvrunError):
    """A flag, an environment variable or a field of a config file cannot be honoured."""

    exit_code = 10


class Unsupported(ConfigError):
    """The thing asked for is well formed, but this version does not do it."""


class FilesError(KvrunError):
    """A file is missing, short, corrupt or not of the declared shape."""

    exit_code = 11


class OutOfMemory(KvrunError):
    """The weights, the page pool or the adapters do not fit."""

    exit_code = 12


class DeviceError(KvrunError):
    """The device asked for is absent or unusable, or the group of ranks could not be formed."""

    exit_code = 14


class AdapterError(KvrunError):
    """An adapter is unfit for this model; the message names up to ten tensors or the field at fault."""


class AdapterNotFound(AdapterError):
    """No adapter folder, or no adapter file in it, where the path says."""


class AdapterTooLarge(AdapterError):
    """The bytes set aside for adapters have no room left for this one."""


class ImageError(KvrunError):
    """An image cannot be read or shown to the model; only the sequence that has it fails."""


class ProtocolError(KvrunError):
    """A call breaks a rule of the wire; always a bug of the caller, never of a client."""


class StaleEpoch(KvrunError):
    """A call belongs to an epoch that has ended or never began."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, in whichever words this layer says it."""
    words = ("can't allocate memory", "out of memory")  # torch's allocators, of the host and of GPUs
    return isinstance(error, OutOfMemory | MemoryError) or any(word in str(error) for word in words)
