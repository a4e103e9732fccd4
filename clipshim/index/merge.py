"""Merges the entries of an image's layers into the one tree that a container sees.

Does what unpacking layer upon layer does (umoci is the model), with the whiteouts of the OCI
image specification, layer.md: a whiteout or opaque marker hides what lower layers hold, wherever
in its own layer it stands. Nothing here can leave the tree: symbolic links in the parents of an
entry are resolved inside it, as in a chroot. Not for formats: see tar_walk.py, erofs_write.py.

Where unpackers disagree or fail:
- An implied parent directory is 0755, root's, with mtime 0.
- A hard link may come before its target in the layer, and may name a file of a lower layer, even
  one that the same layer whites out. Its own metadata is ignored.
- A file where a directory is needed gives way to an implied directory.
- What AUFS kept for itself at the top (`.wh..wh.plnk` and the like, in images of 2016 and before)
  is no part of the image, but hard links of its layer may lead to it, as in Docker and containerd.
"""

from collections.abc import Iterator, Sequence
from typing import NoReturn

from clipshim.errors import LayerError
from clipshim.index.tar_walk import DIRECTORY, HARD_LINK, SYMLINK, TarEntry

WHITEOUT = b".wh."
AUFS = b".wh..wh."
OPAQUE = b".wh..wh..opq"
MAX_LINKS_FOLLOWED = 255  # as umoci's securejoin
MAX_STEPS = 20_000_000  # path components of symbolic links that one layer may make us walk
MAX_INODES = 4_000_000
MAX_LINK_ROUNDS = 100  # hard links to hard links to ... that come in reverse order
IMPLIED = TarEntry(b"", DIRECTORY, 0o755, 0, 0, 0, 0)


class Node:
    """An inode: its metadata, the layer that holds its data, and for a directory its names.

    `fresh` are the names that layer number `fresh_layer` put here; `touched` is the last layer
    that put anything at or below this directory, `born` the layer below which it held nothing.
    """

    __slots__ = ("born", "children", "entry", "fresh", "fresh_layer", "layer", "nlink", "touched")

    def __init__(self, entry: TarEntry, layer: int) -> None:
        self.entry = entry
        self.layer = layer
        self.nlink = 1
        self.children: dict[bytes, Node] | None = None
        if entry.type == DIRECTORY:
            self.children = {}
            self.fresh: set[bytes] = set()
            self.fresh_layer = self.touched = self.born = layer


class Tree:
    """The merged tree. Every node's nlink is final; a directory counts itself and its children."""

    __slots__ = ("inodes", "root")

    def __init__(self, root: Node) -> None:
        self.root = root
        self.inodes = _count_links(root)

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every name with its node, parents before children, in order of names."""
        pending = [(b"", self.root)]
        while pending:
            path, node = pending.pop()
            yield path, node
            if node.children:
                prefix = path + b"/" if path else b""
                pending += [
                    (prefix + name, node.children[name])
                    for name in sorted(node.children, reverse=True)
                ]


def merge(layers: Sequence[Sequence[TarEntry]], names: Sequence[str] = ()) -> Tree:
    """One tree from the entries of all layers, the lowest layer first.

    `names` are the layers' names for errors. Raises LayerError naming layer and entry.
    """
    root = Node(IMPLIED, 0)
    created = 0
    for number, entries in enumerate(layers):
        layer = _Layer(root, number, names[number] if names else str(number), created)
        layer.apply(entries)
        created = layer.created
    return Tree(root)


class _Layer:
    """The state of unpacking one layer onto the tree of those below it."""

    def __init__(self, root: Node, number: int, name: str, created: int) -> None:
        self._root = root
        self._number = number
        self._name = name
        self._known: dict[bytes, Node] = {}  # parents by path, valid until a directory goes
        self._removed: dict[bytes, Node] = {}  # what whiteouts took away, for hard links to it
        self._waiting: list[TarEntry] = []  # hard links before their target
        self._steps = 0
        self.created = created

    def apply(self, entries: Sequence[TarEntry]) -> None:
        for entry in entries:
            parent, _, name = entry.name.rpartition(b"/")
            if name.startswith(WHITEOUT):
                self._whiteout(entry, parent, name)
            elif not name:
                if entry.type != DIRECTORY:
                    self._fail(entry, "the root can only be a directory")
                self._root.entry, self._root.layer = entry, self._number
            else:
                self._place(entry, parent, name)
        for _ in range(MAX_LINK_ROUNDS):
            waiting, self._waiting = self._waiting, []
            for entry in waiting:
                self._place(entry, *_split(entry.name), late=True)
            if len(self._waiting) in (0, len(waiting)):
                break
        if self._waiting:
            entry = self._waiting[0]
            self._fail(entry, f"hard link to {entry.linkname!r}, which does not exist")
        names = self._root.children
        assert names is not None
        for name in [name for name in names if name.startswith(AUFS)]:
            del names[name]

    def _fail(self, entry: TarEntry, what: str) -> NoReturn:
        raise LayerError(f"layer {self._name}: entry {entry.name!r}: {what}")

    def _create(self, entry: TarEntry, metadata: TarEntry) -> Node:
        self.created += 1
        if self.created > MAX_INODES:
            self._fail(entry, f"the image has more than {MAX_INODES} files")
        return Node(metadata, self._number)

    def _place(self, entry: TarEntry, path: bytes, name: bytes, *, late: bool = False) -> None:
        parent = self._known.get(path)
        if parent is None:
            parent = self._directory(entry, path)
        number = self._number
        children = parent.children
        assert children is not None
        if parent.fresh_layer != number:
            parent.fresh_layer, parent.fresh = number, set()
        old = children.get(name)
        if entry.type == HARD_LINK:
            target = self._link_target(entry)
            if target is None:
                self._waiting.append(entry)
                return
            if target.children is not None:
                self._fail(entry, f"hard link to {entry.linkname!r}, which is a directory")
            if late and old is not None and name in parent.fresh:
                return  # an entry after the link took its name
            node = target
        elif old is not None and old.children is not None and entry.type == DIRECTORY:
            old.entry, old.layer = entry, number
            parent.fresh.add(name)
            return
        else:
            node = self._create(entry, entry)
        if old is not None and (old.children is not None or old.entry.type == SYMLINK):
            self._known.clear()
        children[name] = node
        parent.fresh.add(name)

    def _directory(self, entry: TarEntry, path: bytes) -> Node:
        """The directory that an entry goes into, made if need be, and marked as touched."""
        node = self._resolve(entry, path, create=True)
        assert node is not None
        self._known[path] = node
        return node

    def _resolve(self, entry: TarEntry, path: bytes, *, create: bool) -> Node | None:
        """Follows a path from the root through symbolic links; `..` stops at the root."""
        number = self._number
        trail = [self._root]
        parts = path.split(b"/")[::-1] if path else []
        followed = 0
        while parts:
            part = parts.pop()
            if part in (b"", b"."):
                continue
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            here = trail[-1]
            assert here.children is not None
            node = here.children.get(part)
            if node is not None and node.entry.type == SYMLINK:
                followed += 1
                if followed > MAX_LINKS_FOLLOWED:
                    self._fail(entry, f"too many symbolic links in {path!r}")
                target = node.entry.linkname
                if target.startswith(b"/"):
                    del trail[1:]
                parts += target.split(b"/")[::-1]
                self._steps += target.count(b"/") + 1
                if self._steps > MAX_STEPS:
                    self._fail(entry, "the layer's symbolic links lead through too many others")
                continue
            if node is None or node.children is None:
                if not create:
                    return None
                if len(part) > 255:
                    self._fail(entry, f"a parent's name has {len(part)} bytes")
                if here.fresh_layer != number:
                    here.fresh_layer, here.fresh = number, set()
                node = here.children[part] = self._create(entry, IMPLIED)
                here.fresh.add(part)
            trail.append(node)
        if create:
            for node in trail:
                node.touched = number
        return trail[-1]

    def _link_target(self, entry: TarEntry) -> Node | None:
        path, name = _split(entry.linkname)
        if not name:
            return self._root
        parent = self._known.get(path) or self._resolve(entry, path, create=False)
        found = parent.children.get(name) if parent and parent.children is not None else None
        return found or self._removed_node(entry.linkname)

    def _removed_node(self, path: bytes) -> Node | None:
        if not self._removed:
            return None
        rest: list[bytes] = []
        while path:
            node = self._removed.get(path)
            for part in reversed(rest):
                if node is not None:
                    node = node.children.get(part) if node.children else None
            if node is not None:
                return node
            path, part = _split(path)
            rest.append(part)
        return None

    def _whiteout(self, entry: TarEntry, path: bytes, name: bytes) -> None:
        directory = self._resolve(entry, path, create=False)
        if name == OPAQUE:
            if directory is not None:
                self._hide(directory, path)
            return
        hidden = name[len(WHITEOUT) :]
        if hidden in (b"", b".", b".."):
            self._fail(entry, "a whiteout of no name")
        node = directory.children.get(hidden) if directory and directory.children else None
        if directory is None or directory.children is None or node is None:
            return
        fresh = directory.fresh_layer == self._number and hidden in directory.fresh
        gone = path + b"/" + hidden if path else hidden
        if node.children is not None and (fresh or node.touched == self._number):
            self._hide(node, gone)
        elif not fresh:
            del directory.children[hidden]
            self._removed[gone] = node
            self._known.clear()

    def _hide(self, directory: Node, path: bytes) -> None:
        """Takes away what lower layers put into a directory."""
        pending = [(directory, path)]
        number = self._number
        while pending:
            node, where = pending.pop()
            if node.born == number and node is not self._root:
                continue
            assert node.children is not None
            prefix = where + b"/" if where else b""
            fresh = node.fresh if node.fresh_layer == number else ()
            for name, child in list(node.children.items()):
                if child.children is not None and (name in fresh or child.touched == number):
                    pending.append((child, prefix + name))
                elif name not in fresh:
                    del node.children[name]
                    self._removed[prefix + name] = child
            node.born = number
        self._known.clear()


def _split(path: bytes) -> tuple[bytes, bytes]:
    parent, _, name = path.rpartition(b"/")
    return parent, name


def _count_links(root: Node) -> int:
    """Sets nlink of every node; the number of inodes."""
    seen: dict[int, Node] = {id(root): root}
    pending = [root]
    root.nlink = 2
    while pending:
        node = pending.pop()
        assert node.children is not None
        for child in node.children.values():
            if child.children is not None:
                node.nlink += 1
                child.nlink = 2
                pending.append(child)
                seen[id(child)] = child
            elif id(child) in seen:
                child.nlink += 1
            else:
                child.nlink = 1
                seen[id(child)] = child
    return len(seen)
