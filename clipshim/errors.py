"""The errors that a user of clipshim can meet, each with its exit code and errno.

Standard library only: the runtime's fast path imports this. A message is lower case without a
full stop and names object, expected and found; the hint says what the user can do about it.
"""

import errno

# What helps against errors of the system; the path is in the message.
_REMEDIES = {
    errno.ENOSPC: "make room on that file system",
    errno.EDQUOT: "make room, or have the quota of that file system raised",
    errno.EROFS: "the file system is read-only: see the kernel's log for why, remount it writable",
    errno.EIO: "the disk may be failing: see the kernel's log",
    errno.EMFILE: "raise the limit of open files (LimitNOFILE, ulimit -n)",
    errno.ENFILE: "raise the node's limit of open files (sysctl fs.file-max)",
    errno.ENOMEM: "the node is out of memory, or its control group is",
    errno.EAGAIN: "the node is out of processes or threads (TasksMax, ulimit -u)",
}


def remedy(error: OSError) -> "str | None":
    """What the user can do about an error of the system, if that is known."""
    return _REMEDIES.get(error.errno) if error.errno is not None else None


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
