"""The errors that a user of clipshim can meet, each with its exit code and errno.

Standard library only: the runtime's fast path imports this. A message is lower case without a
full stop and names object, expected and found; the hint says what the user can do about it.
"""

import errno


class ClipError(Exception):
    """Base of all errors that clipshim raises on purpose."""

    exit_code = 1
    errno = errno.EIO

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(ClipError):
    """The command line asks for something that does not exist or contradicts itself."""

    exit_code = 2
    errno = errno.EINVAL


class ConfigError(ClipError):
    """The configuration file cannot be read or holds a wrong key or value."""

    errno = errno.EINVAL


class BadReferenceError(ClipError):
    """An image was named in a way that no registry or archive understands."""

    exit_code = 2
    errno = errno.EINVAL


class RegistryError(ClipError):
    """A registry could not be reached, refused, or answered with something unusable."""


class AuthError(RegistryError):
    """A registry refused the credentials, or asked for some that are not there."""

    errno = errno.EACCES


class NotFoundError(ClipError):
    """What was named does not exist: an image, an index, a container."""

    errno = errno.ENOENT


class PolicyError(ClipError):
    """The configuration does not allow what a container or a caller asked for."""

    errno = errno.EPERM


class LayerError(ClipError):
    """A layer is not what it should be: not a tar stream, damaged, or hostile."""


class DigestError(LayerError):
    """Bytes do not match the digest that names them."""


class SpanDecodeError(LayerError):
    """Compressed bytes of a span cannot be decoded to the promised size."""


class IndexFormatError(ClipError):
    """A .clip file is damaged, of another version, or contradicts itself."""

    errno = errno.EINVAL


class MountError(ClipError):
    """A mount could not be made or taken away."""


class VerifyError(ClipError):
    """A root file system is not fit to start a container from."""


class BundleError(ClipError):
    """An OCI bundle or its config.json cannot be used."""

    errno = errno.EINVAL


class RuntimeNotFoundError(ClipError):
    """No runc (or other low-level runtime) was found."""

    errno = errno.ENOENT


class DaemonError(ClipError):
    """The node daemon could not be reached, started, or did not do what was asked."""


class StoreError(ClipError):
    """The local store cannot be read or written."""
