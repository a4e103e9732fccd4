"""What the server counts itself; what the lazy part counts is in its own statistics."""

from collections import Counter
from dataclasses import dataclass, field

DELETED_DIRECTORY = "DeletedDirectory"  # runc's "wandered into deleted directory": must stay 0


@dataclass
class Events:
    """Counts since this server started."""

    starts: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # by cause
    deleted_directory: int = 0
    unpacked: int = 0
    indexed: int = 0
    indexing_s: float = 0.0

    def container_started(self) -> None:
        """A container got its rootfs and its runtime succeeded."""
        self.starts += 1

    def indexing_took(self, seconds: float) -> None:
        """An image was indexed on demand."""
        self.indexed += 1
        self.indexing_s += seconds

    def container_failed(self, cause: str) -> None:
        """A container could not be started; `cause` is an error's class name."""
        if cause == DELETED_DIRECTORY:
            self.deleted_directory += 1
        known = cause if cause.isidentifier() and len(cause) <= 64 else "other"
        if known not in self.failures and len(self.failures) >= 64:
            known = "other"  # the label comes from outside: bounded
        self.failures[known] += 1
