"""clipshim: an OCI runtime that wraps runc and starts containers before their image has arrived.

For Python programs: index_image, mount_index and OverlayMounter. They are loaded when they are
first used: the runtime's fast path imports this package too.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from clipshim.cli.library import MountedTree, OverlayMounter, index_image, mount_index

__all__ = ["MountedTree", "OverlayMounter", "__version__", "index_image", "mount_index"]


def __getattr__(name: str) -> object:
    if name not in __all__ or name == "__version__":
        raise AttributeError(f"module 'clipshim' has no attribute {name!r}")
    import importlib  # only for library users: it is not on the way of a container

    return getattr(importlib.import_module("clipshim.cli.library"), name)
