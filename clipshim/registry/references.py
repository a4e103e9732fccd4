"""Image names: parsing, Docker's normalisation, the canonical form, and where a name points.

Pure text, except that a bare file-system path is recognised in order to explain the mistake.
Grammar: distribution reference, https://github.com/distribution/reference.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from clipshim.errors import BadReferenceError

ARCHIVE_SCHEMES = ("oci", "oci-archive", "docker-archive")
DOCKER_HUB = "docker.io"
DOCKER_HUB_SERVER = "registry-1.docker.io"
_DOCKER_HUB_NAMES = frozenset({DOCKER_HUB, "index.docker.io", DOCKER_HUB_SERVER})
MAX_NAME = 255  # distribution: RepositoryNameTotalLengthMax

_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*\.?|\[[0-9A-Fa-f:]+\])(?::[0-9]{{1,5}})?")


@dataclass(frozen=True, slots=True)
class Reference:
    """One image in a registry. `registry` is host[:port]; a tag, a digest, or both."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @property
    def server(self) -> str:
        """host[:port] that serves the registry's API."""
        return DOCKER_HUB_SERVER if self.registry == DOCKER_HUB else self.registry

    @property
    def version(self) -> str:
        """What names the manifest in the API: the digest, else the tag."""
        return self.digest or self.tag or "latest"

    @property
    def name(self) -> str:
        """Registry and repository."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        """The canonical form."""
        text = self.name
        if self.tag:
            text += f":{self.tag}"
        if self.digest:
            text += f"@{self.digest}"
        return text


@dataclass(frozen=True, slots=True)
class ArchiveReference:
    """An image in a local directory or archive; `tag` is None if there is only one image."""

    scheme: str  # one of ARCHIVE_SCHEMES
    path: str
    tag: str | None = None

    def __str__(self) -> str:
        return f"{self.scheme}:{self.path}" + (f":{self.tag}" if self.tag else "")


def parse_image(text: str) -> Reference | ArchiveReference:
    """Any image name that a user can give: a registry reference or SCHEME:PATH[:TAG].

    Raises BadReferenceError; its hint says which scheme a bare path probably wants.
    """
    scheme, colon, rest = text.partition(":")
    if colon and scheme in ARCHIVE_SCHEMES and not _is_port_and_repository(rest):
        return _parse_archive(scheme, rest)
    if scheme in ("docker", "registry") and rest.startswith("//"):
        return parse_reference(rest[2:])  # skopeo's docker://
    return parse_reference(text)


def canonical_image(text: str) -> str:
    """The canonical form of any image name; paths of archives become absolute."""
    image = parse_image(text)
    if isinstance(image, ArchiveReference):
        image = ArchiveReference(image.scheme, os.path.abspath(image.path), image.tag)
    return str(image)


def parse_reference(text: str, *, default_tag: str | None = "latest") -> Reference:
    """A registry reference in Docker's form: `ubuntu` is docker.io/library/ubuntu:latest.

    `default_tag` is taken where neither tag nor digest is given. Raises BadReferenceError.
    """
    _refuse_path(text)
    if "://" in text:
        raise BadReferenceError(
            f"image {text!r}: expected HOST/REPOSITORY[:TAG], got a URL",
            hint="leave out the scheme; list the registry in plain_http if it has no TLS",
        )
    name, at, digest = text.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise BadReferenceError(f"image {text!r}: expected a sha256 digest, got {digest!r}")
    registry, repository = _split_registry(name)
    repository, colon, tag = repository.partition(":")
    if colon and not _TAG.fullmatch(tag):
        raise BadReferenceError(f"image {text!r}: expected a tag, got {tag!r}")
    if registry in _DOCKER_HUB_NAMES:
        registry = DOCKER_HUB
        if "/" not in repository:
            repository = f"library/{repository}"
    if not _HOST.fullmatch(registry):
        raise BadReferenceError(f"image {text!r}: expected a host name, got {registry!r}")
    if not _REPOSITORY.fullmatch(repository):
        hint = "repository names are lower case" if repository != repository.lower() else None
        raise BadReferenceError(
            f"image {text!r}: expected a repository name, got {repository!r}", hint=hint
        )
    if len(registry) + 1 + len(repository) > MAX_NAME:
        raise BadReferenceError(f"image {text[:40]!r}…: expected at most {MAX_NAME} characters")
    return Reference(
        registry, repository, tag if colon else (None if at else default_tag), digest or None
    )


def check_digest(text: str) -> str:
    """`text` if it is sha256:<64 hex>, else BadReferenceError: before a path or URL is made."""
    if not _DIGEST.fullmatch(text):
        raise BadReferenceError(f"expected a sha256 digest, got {text[:100]!r}")
    return text


def is_loopback(host: str) -> bool:
    """Whether host[:port] is this machine by name or address, without asking any resolver."""
    name = split_port(host)[0].strip("[]").lower().rstrip(".")
    return name in ("localhost", "::1") or bool(re.fullmatch(r"127(?:\.[0-9]{1,3}){3}", name))


def split_port(host: str) -> tuple[str, int | None]:
    """host[:port] taken apart; brackets of IPv6 addresses stay."""
    name, colon, port = host.rpartition(":")
    bracketed = name.startswith("[") and name.endswith("]")
    if colon and port.isdigit() and (bracketed or ":" not in name):
        return name, int(port)
    return host, None


def _split_registry(name: str) -> tuple[str, str]:
    first, slash, rest = name.partition("/")
    # Docker's rule: the first component is a host if it looks like one, else Docker Hub is meant.
    if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
        return first, rest
    return DOCKER_HUB, name


def _is_port_and_repository(rest: str) -> bool:
    """Whether `oci:…` is a host called oci with a port, as in oci:5000/app."""
    return bool(re.match(r"[0-9]{1,5}/[a-z0-9]", rest)) and not os.path.exists(rest)


def _parse_archive(scheme: str, rest: str) -> ArchiveReference:
    path, tag = rest, None
    if not os.path.exists(rest):
        # The tag may itself hold a colon (docker-archive:f.tar:app:v1): the longest path wins.
        for at in [match.start() for match in re.finditer(":", rest)][::-1]:
            if os.path.exists(rest[:at]):
                path, tag = rest[:at], rest[at + 1 :]
                break
        else:
            head, colon, tail = rest.rpartition(":")
            if colon and _TAG.fullmatch(tail):
                path, tag = head, tail
    if not path:
        raise BadReferenceError(f"image {scheme}:{rest}: expected {scheme}:PATH[:TAG], got no path")
    return ArchiveReference(scheme, path, tag or None)


def _refuse_path(text: str) -> None:
    if not text:
        raise BadReferenceError("expected an image name, got an empty string")
    if not text.startswith(("/", "./", "../", "~")) and text not in (".", ".."):
        # A directory or program called ubuntu beside the user does not make `ubuntu` a path.
        archive = os.path.isfile(text) and ("/" in text or text.endswith((".tar", ".clip")))
        if not archive and not _is_layout(text):
            return
    raise BadReferenceError(
        f"image {text!r}: expected a registry reference or SCHEME:PATH, got a file-system path",
        hint=_scheme_hint(text),
    )


def _is_layout(path: str) -> bool:
    return os.path.exists(os.path.join(path, "oci-layout")) or os.path.exists(
        os.path.join(path, "index.json")
    )


def _scheme_hint(path: str) -> str:
    if os.path.isdir(path):
        if _is_layout(path):
            return f"an OCI image layout: write oci:{path}"
        if os.path.exists(os.path.join(path, "manifest.json")):
            return f"pack it and write docker-archive:FILE, or write oci:{path} for an OCI layout"
        return f"write oci:{path} if it is an OCI image layout"
    if path.endswith(".clip"):
        return "this is an index; an image is expected here"
    if os.path.isfile(path):
        scheme = _archive_scheme(path)
        return f"write {scheme}:{path}"
    return "write oci:DIR, oci-archive:FILE or docker-archive:FILE; this path does not exist"


def _archive_scheme(path: str) -> str:
    import tarfile  # only for the hint

    try:
        with tarfile.open(path, "r:*") as archive:
            for _, member in zip(range(10_000), archive, strict=False):
                name = member.name.removeprefix("./")
                if name == "oci-layout":
                    return "oci-archive"
                if name == "manifest.json":
                    return "docker-archive"
    except (OSError, tarfile.TarError, EOFError, ValueError):
        pass
    return "oci-archive"
