"""certs.d: which servers are asked for a registry, in which order and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from clipshim.errors import ConfigError
from clipshim.registry.access import RegistryAccess
from clipshim.registry.mirrors import Endpoint, endpoints_for
from clipshim.registry.references import parse_reference

if TYPE_CHECKING:
    from pathlib import Path

FULL = """
server = "https://registry-1.docker.io"

[host."https://mirror.example.com"]
  capabilities = ["pull", "resolve"]
  ca = "mirror.pem"
  client = [["c.pem", "c.key"]]
  [host."https://mirror.example.com".header]
    X-Token = ["a", "b"]

[host."http://10.0.0.1:5000/proxy/v2"]
  capabilities = ["pull"]
  override_path = true
  skip_verify = true
"""


def endpoints(image: str, certs_dir: Path | None = None, **more: object) -> tuple[Endpoint, ...]:
    access = RegistryAccess(
        certs_dir=str(certs_dir) if certs_dir else None,
        **more,  # type: ignore[arg-type]
    )
    return endpoints_for(parse_reference(image), access)


def test_without_configuration_the_registry_itself_is_asked(tmp_path: Path) -> None:
    for directory in (None, tmp_path, tmp_path / "missing"):
        (only,) = endpoints("ubuntu", directory)
        assert only.base == "https://registry-1.docker.io/v2"
        assert only.namespace is None


def test_plain_http_is_for_loopback_and_for_what_is_listed() -> None:
    assert endpoints("127.0.0.1:5000/a")[0].is_plain
    assert endpoints("localhost/a")[0].is_plain
    assert not endpoints("r.io:5000/a")[0].is_plain
    assert endpoints("r.io:5000/a", plain_http=frozenset({"r.io:5000"}))[0].is_plain
    assert endpoints("r.io:5000/a", plain_http=frozenset({"r.io"}))[0].is_plain
    assert not endpoints("r.io:5000/a", plain_http=frozenset({"r.io:5001"}))[0].is_plain


def test_mirrors_come_in_the_order_of_the_file_and_the_origin_last(tmp_path: Path) -> None:
    directory = tmp_path / "docker.io"
    directory.mkdir()
    (directory / "hosts.toml").write_text(FULL)
    mirror, cache, origin = endpoints("ubuntu", tmp_path)
    assert mirror.base == "https://mirror.example.com/v2"
    assert mirror.capabilities == {"pull", "resolve"}
    assert mirror.ca_files == (str(directory / "mirror.pem"),)
    assert mirror.client_certs == ((str(directory / "c.pem"), str(directory / "c.key")),)
    assert mirror.headers == {"X-Token": "a, b"}
    assert mirror.namespace == "docker.io"
    assert cache.base == "http://10.0.0.1:5000/proxy/v2"
    assert cache.capabilities == {"pull"}
    assert cache.skip_verify
    assert origin.base == "https://registry-1.docker.io/v2"
    assert origin.namespace is None


@pytest.mark.parametrize("name", ["r.io_5000_", "r.io:5000", "r.io", "_default"])
def test_the_directory_has_many_spellings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "hosts.toml").write_text('[host."https://m.io"]\n')
    first, last = endpoints("r.io:5000/a", tmp_path)
    assert (first.host, last.host) == ("m.io", "r.io:5000")


def test_certificates_without_hosts_toml(tmp_path: Path) -> None:
    directory = tmp_path / "r.io"
    directory.mkdir()
    for name in ("ca.crt", "client.cert", "client.key", "lonely.cert"):
        (directory / name).touch()
    (only,) = endpoints("r.io/a", tmp_path)
    assert only.ca_files == (str(directory / "ca.crt"),)
    assert only.client_certs == ((str(directory / "client.cert"), str(directory / "client.key")),)


@pytest.mark.parametrize(
    "text",
    [
        "host = 7", "[host", '[host."ftp://m.io"]', '[host."https://m.io"]\ncapabilities = ["fly"]',
        '[host."https://m.io"]\nca = 7', '[host."https://m.io"]\nclient = [["a", "b", "c"]]',
        '[host."https://m.io"]\nheader = 7', '[host."https://m.io?x=1"]',
    ],
)  # fmt: skip
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.io").mkdir()
    (tmp_path / "r.io/hosts.toml").write_text(text)
    with pytest.raises(ConfigError, match=r"hosts\.toml"):
        endpoints("r.io/a", tmp_path)
