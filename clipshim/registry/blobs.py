"""Byte ranges of blobs, wherever they lie: registry, mirror, foreign URL, local file.

What is returned has the right length and was, as far as the server says, the right range. Whether
the bytes are the right ones only a digest tells, and that check is the caller's.
"""

from __future__ import annotations

import io
import os
import re
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clipshim.errors import NotFoundError, RegistryError
from clipshim.registry.attempts import AttemptFailed, Statistics
from clipshim.registry.health import SILENCE
from clipshim.registry.references import (
    ArchiveReference,
    Reference,
    check_digest,
    parse_image,
)
from clipshim.registry.urls import parse_url

if TYPE_CHECKING:
    from collections.abc import Iterator

    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.mirrors import Endpoint
    from clipshim.registry.replies import Reply
    from clipshim.registry.transport import Transport

# A server that ignores Range sends the blob from its start. Up to here the way to the range is
# read and thrown away; beyond it is an error, lest each read of a span fetch the whole layer.
MAX_SKIPPED_BYTES = 1 << 20
MAX_REMEMBERED = 4096
DISTRUST_S = 60.0
STREAM_ATTEMPTS = 6  # in a row without a byte of progress
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")


@dataclass(frozen=True, slots=True)
class RegistryBlob:
    """A blob of a repository; `urls` are further sources, as foreign layers have them."""

    reference: Reference
    digest: str
    size: int
    urls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FileBlob:
    """A blob that lies in a local file, whole, from `offset`: layout, archive, embedded blob."""

    path: str
    offset: int
    size: int


BlobRef = RegistryBlob | FileBlob


def locate_blob(reference: str, digest: str, size: int, urls: tuple[str, ...] = ()) -> BlobRef:
    """Where the blob of an image named by an index's `reference` (and layer's blob_digest) lies.

    Archives are searched, so call it once a layer, not once a read. Raises BadReferenceError,
    NotFoundError when a local image or the blob in it is gone or has another size.
    """
    check_digest(digest)
    image = parse_image(reference)
    if isinstance(image, ArchiveReference):
        from clipshim.registry.archives import open_archive  # only for local images

        found = open_archive(image).locate(digest)
        if found.size != size:
            raise NotFoundError(f"{image}: blob {digest}: expected {size} bytes, got {found.size}")
        return found
    return RegistryBlob(image, digest, size, urls)


class BlobReader:
    """Ranged reads. Blocking and thread-safe; one for all images under the same access.

    It has connections of its own, which close() ends, unless it is given a `transport`.
    """

    def __init__(self, access: RegistryAccess, *, transport: Transport | None = None) -> None:
        from clipshim.registry.transport import Transport  # urllib3 only when there is a reader

        self._owned = transport is None
        self._transport = Transport(access) if transport is None else transport
        self._read_timeout_s = access.read_timeout_s
        self._statistics = Statistics()
        self._lock = threading.Lock()
        # Where a server redirected to, and which server answered last, per blob.
        self._redirects: dict[tuple[str, str, str], str] = {}
        self._served_by: dict[str, str] = {}
        self._distrusted: dict[tuple[str, str], float] = {}

    def read_range(
        self, blob: BlobRef, start: int, length: int, *, deadline: float, hurried: bool = False
    ) -> bytes:
        """Exactly `length` bytes of the stored blob from byte `start`, by `deadline` (monotonic).

        An interrupted body is continued where it broke, at whichever server is next. `hurried`:
        the caller can ask elsewhere, so servers that keep silent are soon given up. Raises
        RegistryError (AuthError for refusals) naming blob, range, host and cause.
        """
        if start < 0 or length <= 0 or start + length > blob.size:
            raise RegistryError(
                f"range {start}+{length} does not lie in a blob of {blob.size} bytes"
            )
        if isinstance(blob, FileBlob):
            return self._read_file(blob, start, length)
        got = _Pieces()
        foreign = self._foreign(blob)

        def operation(endpoint: Endpoint) -> bytes:
            before = got.size
            try:
                self._continue(endpoint, blob, start, length, got, deadline, foreign)
            except AttemptFailed as failure:
                failure.progressed = got.size > before
                raise
            finally:
                self._statistics.add_bytes(got.size - before)
            return got.joined()

        return self._transport.exchange(
            blob.reference,
            operation,
            capability="pull",
            what=f"blob {blob.digest} bytes {start}-{start + length - 1}",
            deadline=deadline,
            statistics=self._statistics,
            last_resort=foreign,
            distrusted=self._distrusted_bases(blob.digest),
            hurried=hurried,
        )

    def open_stream(self, blob: BlobRef) -> io.BufferedReader:
        """The whole blob from byte 0, continued after interruptions; errors as read_range's."""
        if isinstance(blob, FileBlob):
            return io.BufferedReader(_FileSlice(blob), 1 << 20)
        return io.BufferedReader(_PieceStream(self._pieces(blob)), 1 << 20)

    def distrust(self, blob: BlobRef) -> None:
        """Tells that bytes of `blob` did not match their digest: for a minute, others come first.

        The server that answered last is asked last, and a remembered redirect is forgotten.
        """
        if isinstance(blob, FileBlob):
            return
        with self._lock:
            base = self._served_by.pop(blob.digest, None)
            if base is None:
                return
            self._redirects.pop((base, blob.reference.repository, blob.digest), None)
            now = time.monotonic()
            self._distrusted = {k: until for k, until in self._distrusted.items() if until > now}
            self._distrusted[blob.digest, base] = now + DISTRUST_S

    def statistics(self) -> dict[str, object]:
        """{"requests", "bytes", "failures": int, "retries": {cause: int}}."""
        return self._statistics.snapshot()

    def close(self) -> None:
        """Ends waiting readers with an error and drops the connections; those of its own only."""
        if self._owned:
            self._transport.close()

    def _foreign(self, blob: RegistryBlob) -> tuple[Endpoint, ...]:
        from clipshim.registry.mirrors import Endpoint

        result = []
        for url in blob.urls:
            parts = parse_url(url)
            if parts is None:
                continue
            # The index chose these URLs, and an index is hostile: loopback is not for it to name
            # unless the registry itself is there.
            plain = parts.scheme == "http" and (
                parts.netloc in self._transport.access.plain_http
                or self._transport.may_be_plain(blob.reference.server)
            )
            if parts.scheme == "https" or plain:
                result.append(Endpoint(base=url, host=parts.netloc))
        return tuple(result)

    def _distrusted_bases(self, digest: str) -> frozenset[str]:
        now = time.monotonic()
        with self._lock:
            return frozenset(
                base
                for (of, base), until in self._distrusted.items()
                if of == digest and until > now
            )

    def _continue(
        self,
        endpoint: Endpoint,
        blob: RegistryBlob,
        start: int,
        length: int,
        got: _Pieces,
        deadline: float,
        foreign: tuple[Endpoint, ...],
    ) -> None:
        """One attempt at the part of the range that is not in `got` yet."""
        begin = start + got.size
        wanted = length - got.size
        with ExitStack() as stack:
            reply = self._request(stack, endpoint, blob, begin, wanted, deadline, foreign)
            skip = _check_range(reply, begin, wanted, blob.size)
            self._remember(endpoint, blob, reply)
            for piece in _pieces_of(reply, deadline, self._read_timeout_s, skip + wanted):
                useful = piece[skip:] if skip else piece
                skip = max(0, skip - len(piece))
                got.add(useful)
        if got.size < length:
            raise AttemptFailed(
                "short-body", f"expected {wanted} bytes, got {start + got.size - begin}",
                retryable=True,
            )  # fmt: skip

    def _request(
        self,
        stack: ExitStack,
        endpoint: Endpoint,
        blob: RegistryBlob,
        begin: int,
        wanted: int,
        deadline: float,
        foreign: tuple[Endpoint, ...] = (),
    ) -> Reply:
        headers = {"Range": f"bytes={begin}-{begin + wanted - 1}"}
        if begin == 0 and wanted == blob.size:
            headers = {}
        accept = (200, 206)
        if endpoint in foreign:
            return stack.enter_context(
                self._transport.fetch_url(
                    endpoint.base, headers=headers, deadline=deadline, accept=accept,
                    statistics=self._statistics, patience_s=endpoint.patience_s,
                )
            )  # fmt: skip
        key = (endpoint.base, blob.reference.repository, blob.digest)
        with self._lock:
            remembered = self._redirects.get(key)
        if remembered is not None:
            try:
                return stack.enter_context(
                    self._transport.fetch_url(
                        remembered, headers=headers, deadline=deadline, accept=accept,
                        statistics=self._statistics, patience_s=endpoint.patience_s,
                    )
                )  # fmt: skip
            except AttemptFailed as failure:
                # Most likely its signature has expired: ask the registry again, in this attempt.
                with self._lock:
                    self._redirects.pop(key, None)
                self._statistics.add_retry(failure.cause)
        return stack.enter_context(
            self._transport.send(
                endpoint,
                blob.reference,
                "GET",
                f"{blob.reference.repository}/blobs/{blob.digest}",
                headers=headers,
                deadline=deadline,
                accept=accept,
                statistics=self._statistics,
            )
        )

    def _remember(self, endpoint: Endpoint, blob: RegistryBlob, reply: Reply) -> None:
        with self._lock:
            for table in (self._redirects, self._served_by):
                while len(table) >= MAX_REMEMBERED:
                    table.pop(next(iter(table)))  # type: ignore[call-overload]
            self._served_by[blob.digest] = endpoint.base
            if reply.moved:
                key = (endpoint.base, blob.reference.repository, blob.digest)
                self._redirects[key] = reply.url

    def _read_file(self, blob: FileBlob, start: int, length: int) -> bytes:
        what = f"file {blob.path} bytes {blob.offset + start}+{length}"
        parts = []
        try:
            fd = os.open(blob.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while length > 0:
                    part = os.pread(fd, length, blob.offset + start)
                    if not part:
                        raise RegistryError(f"{what}: the file ends before")
                    parts.append(part)
                    start += len(part)
                    length -= len(part)
            finally:
                os.close(fd)
        except OSError as exc:
            raise RegistryError(f"{what}: {exc.strerror}") from exc
        return b"".join(parts)

    def _pieces(self, blob: RegistryBlob) -> Iterator[bytes]:
        """The blob from 0; a broken body is continued as long as it makes progress."""
        what = f"blob {blob.digest}"
        offset = 0
        idle_attempts = 0
        foreign = self._foreign(blob)
        while offset < blob.size:
            before = offset
            try:
                # Outside the `with`: leaving it turns transport trouble into AttemptFailed.
                with ExitStack() as stack:
                    reply, skip = self._opened(stack, blob, offset, foreign)
                    limit = skip + blob.size - offset
                    for piece in _pieces_of(reply, float("inf"), self._read_timeout_s, limit):
                        useful = piece[skip:] if skip else piece
                        skip = max(0, skip - len(piece))
                        offset += len(useful)
                        if useful:
                            yield useful
                    if offset < blob.size:
                        raise AttemptFailed(
                            "short-body", f"ended at {offset} of {blob.size} bytes", retryable=True
                        )
            except AttemptFailed as failure:
                self._statistics.add_retry(failure.cause)
                idle_attempts = 0 if offset > before else idle_attempts + 1
                if offset == before and failure.cause in SILENCE:
                    self._avoid(blob)
                if idle_attempts >= STREAM_ATTEMPTS:
                    raise RegistryError(
                        f"{what} from byte {offset}: {blob.reference.registry}: {failure.message}",
                        hint=failure.hint,
                    ) from failure
                self._transport.pause(max(idle_attempts, 1), what)
            finally:
                self._statistics.add_bytes(offset - before)

    def _avoid(self, blob: RegistryBlob) -> None:
        """The server that took the request sent nothing: others come first for a while."""
        with self._lock:
            base = self._served_by.get(blob.digest)
        if base is not None:
            self._transport.health.kept_silent(base)

    def _opened(
        self, stack: ExitStack, blob: RegistryBlob, at: int, foreign: tuple[Endpoint, ...]
    ) -> tuple[Reply, int]:
        def operation(endpoint: Endpoint) -> tuple[Reply, int]:
            return self._open_at(stack, endpoint, blob, at, foreign)

        return self._transport.exchange(
            blob.reference,
            operation,
            capability="pull",
            what=f"blob {blob.digest}",
            attempts=STREAM_ATTEMPTS,
            statistics=self._statistics,
            last_resort=foreign,
        )

    def _open_at(
        self,
        stack: ExitStack,
        endpoint: Endpoint,
        blob: RegistryBlob,
        at: int,
        foreign: tuple[Endpoint, ...],
    ) -> tuple[Reply, int]:
        wanted = blob.size - at
        deadline = time.monotonic() + self._transport.access.deadline_s
        with ExitStack() as attempt:
            reply = self._request(attempt, endpoint, blob, at, wanted, deadline, foreign)
            skip = _check_range(reply, at, wanted, blob.size, max_skip=blob.size)
            self._remember(endpoint, blob, reply)
            stack.push(attempt.pop_all())
        return reply, skip


class _Pieces:
    """What has come of a range. Copied once, or not at all: the copy holds up all threads."""

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[bytes] = []

    def add(self, piece: bytes) -> None:
        """The next bytes."""
        self._pieces.append(piece)
        self.size += len(piece)

    def joined(self) -> bytes:
        """All of them."""
        return self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)


def _pieces_of(reply: Reply, deadline: float, read_timeout_s: float, limit: int) -> Iterator[bytes]:
    from clipshim.registry.replies import read_chunks  # urllib3 only when a request is made

    return read_chunks(reply, deadline, read_timeout_s, limit)


def _check_range(
    reply: Reply, begin: int, wanted: int, size: int, *, max_skip: int = MAX_SKIPPED_BYTES
) -> int:
    """How many bytes to throw away before the range; AttemptFailed if it is another range."""
    declared = reply.headers.get("Content-Length", "")
    encoding = reply.headers.get("Content-Encoding", "identity")
    if encoding not in ("identity", ""):
        raise AttemptFailed("protocol", f"unwanted encoding {encoding!r}", retryable=False)
    if reply.status == 200:
        if declared.isdigit() and int(declared) != size:
            raise AttemptFailed(
                "wrong-size", f"expected a blob of {size} bytes, got {declared}", retryable=False
            )
        if begin > max_skip:
            raise AttemptFailed(
                "range-ignored",
                f"expected bytes from {begin}, got the whole blob: ranges are not supported",
                retryable=False,
                hint="use a registry or mirror that answers range requests",
            )
        return begin
    said = reply.headers.get("Content-Range", "")
    match = _CONTENT_RANGE.fullmatch(said.strip())
    right = match is not None and (
        int(match[1]) == begin
        and int(match[2]) == begin + wanted - 1
        and match[3] in ("*", str(size))
    )
    if not right:
        raise AttemptFailed(
            "bad-range",
            f"expected bytes {begin}-{begin + wanted - 1}/{size}, got {said[:80] or 'no range'}",
            retryable=False,
        )
    if declared.isdigit() and int(declared) != wanted:
        raise AttemptFailed(
            "bad-range", f"expected {wanted} bytes, got a length of {declared}", retryable=True
        )
    return 0


class _PieceStream(io.RawIOBase):
    """A file made of pieces; closing it ends the transfer."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._iterator = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if not self._rest:
            self._rest = memoryview(next(self._iterator, b""))
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            close = getattr(self._iterator, "close", None)
            if close is not None:
                close()
        super().close()


class _FileSlice(io.RawIOBase):
    """A part of a local file."""

    def __init__(self, blob: FileBlob) -> None:
        try:
            self._file = open(blob.path, "rb", buffering=0)  # noqa: SIM115 - closed by close()
        except OSError as exc:
            raise RegistryError(f"file {blob.path}: {exc.strerror}") from exc
        self._file.seek(blob.offset)
        self._left = blob.size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: self._left]
        count = self._file.readinto(view) or 0 if view else 0
        self._left -= count
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
