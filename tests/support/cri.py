"""The few calls of the Kubernetes container runtime interface (CRI v1) that the tests make.

Messages are written on the wire by field number, as api.proto of k8s.io/cri-api declares them:
this needs no generated code. Not a general client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# A message is a list of (field number, value); nested messages are such lists again.
NETWORK_OF_NODE = 2  # NamespaceMode NODE
RUNNING, EXITED = 1, 2  # ContainerState
TIMEOUT_S = 180


class Message(list[tuple[int, object]]):
    """Fields in order; a repeated field is given several times."""

    def encode(self) -> bytes:
        """Protocol buffers wire format: varints and length-delimited fields only."""
        out = bytearray()
        for number, value in self:
            if isinstance(value, bool | int):
                out += _varint(number << 3) + _varint(int(value))
                continue
            if isinstance(value, (Message, str)):
                data = value.encode()
            else:
                assert isinstance(value, bytes)
                data = value
            out += _varint(number << 3 | 2) + _varint(len(data)) + data
        return bytes(out)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7

    while position < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
        elif key & 7 == 2:
            length = varint()
            yield key >> 3, data[position : position + length]
            position += length
        else:
            raise ValueError(f"wire type {key & 7} is in no message used here")


def _text(data: bytes, number: int) -> str:
    for found, value in _fields(data):
        if found == number and isinstance(value, bytes):
            return value.decode()
    return ""


def _number(data: bytes, number: int) -> int:
    for found, value in _fields(data):
        if found == number and isinstance(value, int):
            return value
    return 0


class Cri:
    """A connection to the CRI plugin of a containerd."""

    def __init__(self, socket: Path) -> None:
        self.channel = grpc.insecure_channel(f"unix://{socket}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def _call(self, service: str, method: str, *fields: tuple[int, object]) -> bytes:
        call = self.channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=Message.encode,
            response_deserializer=bytes,
        )
        answer = call(Message(fields), timeout=TIMEOUT_S, wait_for_ready=True)
        assert isinstance(answer, bytes)
        return answer

    def _runtime(self, method: str, *fields: tuple[int, object]) -> bytes:
        return self._call("RuntimeService", method, *fields)

    def knows_image(self, name: str) -> bool:
        """Whether the plugin has noticed an image that was imported."""
        answer = self._call("ImageService", "ImageStatus", (1, Message([(1, name)])))
        return any(number == 1 and value for number, value in _fields(answer))

    def run_sandbox(
        self,
        name: str,
        handler: str,
        cgroup_parent: str,
        annotations: dict[str, str] | None = None,
    ) -> tuple[str, Message]:
        """Starts a pod on the node's network; its id, and its configuration for create()."""
        namespaces = Message([(1, NETWORK_OF_NODE)])
        linux = Message([(1, cgroup_parent), (2, Message([(1, namespaces)]))])
        metadata = Message([(1, name), (2, f"uid-{name}"), (3, "default"), (4, 0)])
        config = Message([(1, metadata), (8, linux)])
        for key, value in (annotations or {}).items():
            config.append((7, Message([(1, key), (2, value)])))
        return _text(self._runtime("RunPodSandbox", (1, config), (2, handler)), 1), config

    def create(
        self,
        sandbox: str,
        sandbox_config: Message,
        name: str,
        image: str,
        command: list[str],
        annotations: dict[str, str] | None = None,
    ) -> str:
        """Creates a container in a pod; its id."""
        config = Message([(1, Message([(1, name)])), (2, Message([(1, image)]))])
        config += [(3, word) for word in command]
        for key, value in (annotations or {}).items():
            config.append((10, Message([(1, key), (2, value)])))
        answer = self._runtime("CreateContainer", (1, sandbox), (2, config), (3, sandbox_config))
        return _text(answer, 1)

    def start(self, container: str) -> None:
        """Starts a container."""
        self._runtime("StartContainer", (1, container))

    def status(self, container: str) -> tuple[int, int]:
        """(state, exit code)."""
        for number, value in _fields(self._runtime("ContainerStatus", (1, container))):
            if number == 1 and isinstance(value, bytes):
                return _number(value, 3), _number(value, 7)
        raise LookupError(container)

    def exec(self, container: str, command: list[str]) -> tuple[int, str]:
        """Runs a command in a container: its exit code and stdout."""
        words: list[tuple[int, object]] = [(2, word) for word in command]
        answer = self._runtime("ExecSync", (1, container), *words, (3, TIMEOUT_S))
        return _number(answer, 3), _text(answer, 1)

    def remove(self, container: str) -> None:
        """Stops and removes a container."""
        self._runtime("StopContainer", (1, container), (2, 0))
        self._runtime("RemoveContainer", (1, container))

    def remove_sandbox(self, sandbox: str) -> None:
        """Stops and removes a pod."""
        self._runtime("StopPodSandbox", (1, sandbox))
        self._runtime("RemovePodSandbox", (1, sandbox))
