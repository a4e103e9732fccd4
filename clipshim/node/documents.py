"""The documents that `clipshim status` and `clipshim report` show. Shapes only."""

from pydantic import BaseModel


class ImageStatus(BaseModel):
    """One tree."""

    image_id: str
    reference: str
    mode: str
    state: str
    containers: int
    layers: int
    size: int  # uncompressed bytes of all layers
    mounted_at: int  # seconds since the epoch
    needs_daemon: bool  # false: every layer is complete, or the image is unpacked


class ContainerStatus(BaseModel):
    """One container that clipshim made a rootfs for."""

    id: str
    key: str
    image_id: str
    reference: str
    kind: str
    root: str


class CacheStatus(BaseModel):
    """The layer store; sizes in bytes."""

    layers: int
    complete_layers: int
    used_bytes: int
    limit_bytes: int
    evicted_bytes: int
    full: int


class Status(BaseModel):
    """The whole node."""

    version: str
    pid: int
    keeper_pid: int | None
    start_time: int
    server_restarts: int
    erofs: str  # yes, no with the reason, or not probed
    images: list[ImageStatus]
    containers: list[ContainerStatus]
    cache: CacheStatus
    fetch: dict[str, int]
    registries_not_answering: dict[str, str]


class LayerReport(BaseModel):
    """One layer of a container's image; sizes in bytes."""

    diff_id: str
    size: int
    spans: int
    cached_spans: int
    complete: bool
    fetched_bytes: int
    fetched_spans: int
    reads: int


class SpanTouch(BaseModel):
    """A span that a container read while it started, in order."""

    order: int
    layer: int
    span: int


class Report(BaseModel):
    """What a container's image has caused to be fetched since the server started."""

    container: str
    image_id: str
    reference: str
    mode: str
    image_bytes: int  # compressed size of all layers
    fetched_bytes: int
    layers: list[LayerReport]
    touched_at_start: list[SpanTouch]
