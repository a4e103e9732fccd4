"""A small read-only registry on loopback that serves OCI layouts. For the quickstart only.

Just enough of the distribution specification for pulling: manifests, blobs and ranges. It has no
log-in, no uploads and no TLS, and refuses to listen anywhere but on loopback.

    python -m clipshim.registry.embedded_server LAYOUT NAME [--port N] [--port-file FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

from clipshim.errors import ClipError, UsageError
from clipshim.registry.archives import open_archive
from clipshim.registry.manifests import MAX_MANIFEST_BYTES, digest_of, media_type_of
from clipshim.registry.references import ArchiveReference, is_loopback

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clipshim.registry.archives import LocalImage
    from clipshim.registry.blobs import FileBlob

COPY_BYTES = 256 << 10
_PATH = re.compile(r"/v2/(?P<name>[a-z0-9/._-]+)/(?P<kind>manifests|blobs)/(?P<version>[^/?]+)")
_RANGE = re.compile(r"bytes=(\d{1,19})-(\d{1,19})?")


class EmbeddedRegistry:
    """Serves layouts until it is closed. Use as a context manager.

    `requests` and `bytes_sent` (bodies of blobs) count what clients took.
    """

    def __init__(
        self, layouts: Mapping[str, str], *, host: str = "127.0.0.1", port: int = 0
    ) -> None:
        if not is_loopback(host):
            raise UsageError(f"embedded registry: expected a loopback address, got {host}")
        self.images = {
            name: open_archive(ArchiveReference("oci", path)) for name, path in layouts.items()
        }
        self._lock = threading.Lock()
        self.requests = 0
        self.bytes_sent = 0
        self._server = _Server((host, port), _Handler)
        self._server.registry = self
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """host:port, as in image names."""
        host, port = self._server.server_address[:2]
        return f"{host if isinstance(host, str) else host.decode()}:{port}"

    def __enter__(self) -> EmbeddedRegistry:
        self._thread = threading.Thread(
            target=self.serve_forever, name="embedded registry", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def serve_forever(self) -> None:
        """Answers requests until close() is called from another thread."""
        self._server.serve_forever(poll_interval=0.1)

    def close(self) -> None:
        """Stops listening. Only for a registry that is being served."""
        self._server.shutdown()
        self._server.server_close()
        if self._thread is not None:
            self._thread.join()

    def count(self, *, sent: int) -> None:
        """Counts one request."""
        with self._lock:
            self.requests += 1
            self.bytes_sent += sent


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # idle keep-alive connections must not hold up the end
    registry: EmbeddedRegistry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # an idle connection is closed

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def _answer(self, *, with_body: bool) -> None:
        registry = cast("_Server", self.server).registry
        path = self.path.partition("?")[0]
        if path in ("/v2", "/v2/"):
            self._send(b"{}", "application/json", with_body=with_body)
            return
        match = _PATH.fullmatch(path)
        image = registry.images.get(match["name"]) if match else None
        if match is None or image is None:
            self._refuse("NAME_UNKNOWN", f"no repository at {path[:200]}")
            return
        try:
            if match["kind"] == "blobs":
                self._send_blob(image.locate(match["version"]), match["version"], with_body)
            else:
                self._send_manifest(image, match["version"], with_body)
        except ClipError as exc:
            self._refuse("MANIFEST_UNKNOWN", exc.message)

    def _send_manifest(self, image: LocalImage, version: str, with_body: bool) -> None:
        if version.startswith("sha256:"):
            raw, declared = image.read(version, MAX_MANIFEST_BYTES), ""
        else:
            raw, declared = image.manifest()
        kind = media_type_of(json.loads(raw), declared)
        self._send(raw, kind, with_body=with_body, digest=digest_of(raw))

    def _send_blob(self, blob: FileBlob, digest: str, with_body: bool) -> None:
        first, last = 0, blob.size - 1
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is not None:
            first = int(asked[1])
            last = min(int(asked[2]) if asked[2] else last, last)
            if first > last:
                self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                self.send_header("Content-Range", f"bytes */{blob.size}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(HTTPStatus.PARTIAL_CONTENT if asked else HTTPStatus.OK)
        length = last - first + 1
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(length))
        self.send_header("Docker-Content-Digest", digest)
        self.send_header("Accept-Ranges", "bytes")
        if asked is not None:
            self.send_header("Content-Range", f"bytes {first}-{last}/{blob.size}")
        self.end_headers()
        cast("_Server", self.server).registry.count(sent=length if with_body else 0)
        if with_body:
            self._copy(blob, first, length)

    def _copy(self, blob: FileBlob, first: int, length: int) -> None:
        with open(blob.path, "rb") as file:
            file.seek(blob.offset + first)
            while length > 0:
                piece = file.read(min(length, COPY_BYTES))
                if not piece:
                    self.close_connection = True
                    return
                self.wfile.write(piece)
                length -= len(piece)

    def _send(self, raw: bytes, kind: str, *, with_body: bool, digest: str = "") -> None:
        cast("_Server", self.server).registry.count(sent=0)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()
        if with_body:
            self.wfile.write(raw)

    def _refuse(self, code: str, message: str) -> None:
        raw = json.dumps({"errors": [{"code": code, "message": message}]}).encode()
        self.send_response(HTTPStatus.NOT_FOUND)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)


def main(arguments: list[str] | None = None) -> int:
    """Serves one layout until the process is ended; prints the image's address when ready."""
    parser = argparse.ArgumentParser(prog="embedded_server", description=__doc__.split("\n")[0])
    parser.add_argument("layout", help="directory with an OCI image layout")
    parser.add_argument("name", help="repository name to serve it under")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--port-file", help="where to write host:port once it listens")
    options = parser.parse_args(arguments)
    registry = EmbeddedRegistry({options.name: options.layout}, port=options.port)
    if options.port_file:
        temporary = f"{options.port_file}.new"
        with open(temporary, "w") as file:
            file.write(registry.address)
        os.rename(temporary, options.port_file)
    print(f"{registry.address}/{options.name}", flush=True)
    try:
        registry.serve_forever()
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
