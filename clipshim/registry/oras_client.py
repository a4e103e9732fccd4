"""oras's registry client, with clipshim's own transport and credentials below it. For pushing.

oras knows the protocol of uploads; every request it makes goes through `do_request`, which is
replaced here, so that tokens are renewed, timeouts and mirrors hold and failures are our errors.
Reading does not go through oras: it drops the raw bytes of manifests, and with them the digest.
"""

from __future__ import annotations

import io
import time
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urlunsplit

import oras.container
import oras.provider
import requests
import requests.structures

from clipshim.errors import RegistryError
from clipshim.registry.attempts import AttemptFailed
from clipshim.registry.manifests import digest_of
from clipshim.registry.replies import read_body
from clipshim.registry.urls import parse_url

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    from clipshim.registry.access import RegistryAccess
    from clipshim.registry.mirrors import Endpoint
    from clipshim.registry.references import Reference

MAX_ANSWER_BYTES = 4 << 20
UPLOAD_ATTEMPTS = 4
# What oras's methods look at themselves; everything else is an error of the exchange.
_ACCEPTED = (200, 201, 202, 204, 206, 404)


class PushClient(oras.provider.Registry):  # type: ignore[misc]
    """Pushes blobs and manifests to the repository of one reference."""

    def __init__(self, access: RegistryAccess, reference: Reference) -> None:
        self._access = access
        self._reference = reference
        self._target = self._endpoint()
        super().__init__(hostname=self._target.host, insecure=self._target.is_plain)
        self._container = oras.container.Container(f"{self._target.host}/{reference.repository}")

    def push_blob(self, open_blob: Callable[[], IO[bytes]], digest: str, size: int) -> None:
        """Uploads a blob unless the registry has it already. Raises RegistryError, AuthError."""
        layer = {"digest": digest, "size": size}
        failed: RegistryError | None = None
        for attempt in range(1, UPLOAD_ATTEMPTS + 1):
            try:
                # An upload session does not outlive a broken request: each attempt is a new one.
                if self.blob_exists(layer, self._container):
                    return
                answer = self._upload(open_blob, layer)
            except RegistryError as exc:
                if not isinstance(exc.__cause__, AttemptFailed) or not exc.__cause__.retryable:
                    raise
                failed = exc
                self._access.transport.pause(attempt, f"blob {digest}")
                continue
            if answer.status_code not in (201, 202, 204):
                raise RegistryError(
                    f"blob {digest}: {self._reference.registry}: expected 201, "
                    f"got {answer.status_code} for the upload"
                )
            return
        assert failed is not None
        raise failed

    def push_bytes(self, raw: bytes, digest: str | None = None) -> str:
        """Uploads a small blob; returns its digest."""
        digest = digest or digest_of(raw)
        self.push_blob(lambda: io.BytesIO(raw), digest, len(raw))
        return digest

    def push_manifest(self, raw: bytes, media_type: str, version: str) -> requests.Response:
        """Puts a manifest, byte for byte, at a tag or digest. Raises RegistryError, AuthError."""
        answer = self.do_request(
            f"{self.prefix}://{self._container.manifest_url(version)}",
            "PUT",
            data=raw,
            headers={"Content-Type": media_type},
        )
        if answer.status_code not in (200, 201, 202):
            raise RegistryError(
                f"image {self._reference}: {self._target.host}: expected 201, "
                f"got {answer.status_code} for the manifest"
            )
        return answer

    def do_request(  # the one place where oras makes requests
        self,
        url: str,
        method: str = "GET",
        data: Any = None,
        headers: dict[str, str] | None = None,
        json: Any = None,
        stream: bool = False,
    ) -> requests.Response:
        """One request with all its attempts, through Transport."""
        assert json is None, "manifests are pushed as raw bytes"
        assert not stream
        is_upload = method == "PUT" and "/blobs/uploads/" in url
        transport = self._access.transport
        deadline = time.monotonic() + self._access.deadline_s

        def operation(endpoint: Endpoint) -> requests.Response:
            if endpoint.base != self._target.base:
                raise AttemptFailed("protocol", "not the server pushed to", retryable=False)
            with transport.send(
                endpoint,
                self._reference,
                method,
                "",
                headers=headers,
                body=data,
                actions="pull" if method in ("GET", "HEAD") else "pull,push",
                deadline=deadline,
                accept=_ACCEPTED,
                url=url,
            ) as reply:
                body = b""
                if method != "HEAD":
                    body = read_body(reply, MAX_ANSWER_BYTES, deadline, self._access.read_timeout_s)
                return _as_requests(method, url, reply.status, dict(reply.headers), body)

        return transport.exchange(
            self._reference,
            operation,
            capability="push",
            what=f"push to {self._reference.name}",
            deadline=deadline,
            attempts=1 if is_upload else UPLOAD_ATTEMPTS,
        )

    def _upload(
        self, open_blob: Callable[[], IO[bytes]], layer: dict[str, Any]
    ) -> requests.Response:
        """POST for a session, then PUT of the whole blob, streamed."""
        begun = self.do_request(
            f"{self.prefix}://{self._container.upload_blob_url()}",
            "POST",
            data=b"",
            headers={"Content-Length": "0"},
        )
        parts = parse_url(self._get_location(begun, self._container) or "")
        if begun.status_code not in (200, 201, 202) or parts is None:
            raise RegistryError(
                f"push to {self._reference.name}: {self._target.host}: expected an upload "
                f"session, got {begun.status_code}"
            )
        query = urlencode([*parse_qsl(parts.query), ("digest", layer["digest"])])
        return self.do_request(
            urlunsplit(parts._replace(query=query)),
            "PUT",
            data=open_blob,
            headers={
                "Content-Length": str(layer["size"]),
                "Content-Type": "application/octet-stream",
            },
        )

    def _endpoint(self) -> Endpoint:
        endpoints = self._access.transport.endpoints(self._reference, "push")
        if not endpoints:
            raise RegistryError(f"no server of {self._reference.registry} may push")
        return endpoints[-1]  # the origin: a mirror must not keep what its origin does not have


def opener_of(path: str | os.PathLike[str]) -> Callable[[], IO[bytes]]:
    """For push_blob: opens a file anew for each attempt."""
    return lambda: open(path, "rb")


def _as_requests(
    method: str, url: str, status: int, headers: dict[str, str], body: bytes
) -> requests.Response:
    """What oras's own code expects to be given back."""
    answer = requests.Response()
    answer.status_code = status
    answer.headers = requests.structures.CaseInsensitiveDict(headers)
    answer.url = url
    answer._content = body
    answer.request = requests.Request(method, url).prepare()
    return answer
