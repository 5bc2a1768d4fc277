"""The errors that realm_web raises for a person to read.

`str(error)` is one line that says what is wrong, where, and the cure. The command line prints that line and
exits with code 2; the page shows it as it is. Anything else that escapes is a bug of ours.
"""


class RealmError(Exception):
    """Base of every error that is the input's, the request's or the machine's fault, not the code's.

    >>> str(FormatError("model.gguf: not a GGUF file;\\n give a .gguf"))
    'model.gguf: not a GGUF file; give a .gguf'
    """

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


class FormatError(RealmError):
    """Malformed data: GGUF header, metadata or tokenizer tables."""


class UnsupportedError(RealmError):
    """Well-formed, but not for us: an architecture, quant type or device feature; names what is supported."""


class RequestError(RealmError):
    """A request that cannot be served: too long a prompt, a parameter out of range, a hostile template."""


class DeviceError(RealmError):
    """The device failed: none found, out of memory (needed and had), lost, or a shader did not compile."""


class OutOfDeviceMemory(DeviceError):
    """An allocation on the device failed; what was there before is untouched."""


class DeviceLost(DeviceError):
    """The device is gone with all that was on it: reset by the driver, unplugged, or its page was hidden."""
