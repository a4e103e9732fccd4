"""Finds the verb, the container ID and the flags that matter in runc's command line.

The rules are those of runc's own parser (urfave/cli v1 on top of Go's flag package): `-x` and `--x`
are the same, `--flag=value` is allowed, `--` ends flags, flags of a verb may follow the container's
ID except with exec. launcher.c holds the same table of global flags; a test compares the two.
It rejects nothing: what it does not understand is runc's to complain about.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

GLOBAL_VALUES = frozenset(("log", "log-format", "root", "rootless", "criu"))
GLOBAL_SWITCHES = frozenset(("debug", "systemd-cgroup", "help", "h", "version", "v"))

_CREATE_VALUES = ("bundle", "b", "console-socket", "pidfd-socket", "pid-file", "preserve-fds")
_CREATE_SWITCHES = ("no-pivot", "no-new-keyring")
_HELP = ("help", "h")

# verb: (flags with a value, flags without)
OUR_VERBS: "dict[str, tuple[frozenset[str], frozenset[str]]]" = {
    "create": (frozenset(_CREATE_VALUES), frozenset((*_CREATE_SWITCHES, *_HELP))),
    "run": (
        frozenset(_CREATE_VALUES),
        frozenset((*_CREATE_SWITCHES, "detach", "d", "keep", "no-subreaper", *_HELP)),
    ),
    "delete": (frozenset(), frozenset(("force", "f", *_HELP))),
    "checkpoint": (
        frozenset(
            (
                "image-path",
                "work-path",
                "parent-path",
                "status-fd",
                "page-server",
                "manage-cgroups-mode",
                "empty-ns",
            )
        ),
        frozenset(
            (
                "leave-running",
                "tcp-established",
                "tcp-skip-in-flight",
                "link-remap",
                "ext-unix-sk",
                "shell-job",
                "lazy-pages",
                "file-locks",
                "pre-dump",
                "auto-dedup",
                *_HELP,
            )
        ),
    ),
    "restore": (
        frozenset(
            (
                "console-socket",
                "image-path",
                "work-path",
                "manage-cgroups-mode",
                "bundle",
                "b",
                "pid-file",
                "empty-ns",
                "lsm-profile",
                "lsm-mount-context",
            )
        ),
        frozenset(
            (
                "tcp-established",
                "ext-unix-sk",
                "shell-job",
                "file-locks",
                "detach",
                "d",
                "no-subreaper",
                "no-pivot",
                "auto-dedup",
                "lazy-pages",
                *_HELP,
            )
        ),
    ),
}
_SHORT = {"b": "bundle", "d": "detach", "f": "force", "h": "help", "v": "version"}


class CommandLine:
    """What was found. `understood` is False when runc will refuse the line, or may."""

    __slots__ = ("container_id", "options", "switches", "understood", "verb", "verb_index")

    def __init__(self) -> None:
        self.verb = ""
        self.verb_index = -1
        self.container_id = ""
        self.options: dict[str, str] = {}  # flags with a value, by their long name; last one wins
        self.switches: set[str] = set()
        self.understood = True

    def __repr__(self) -> str:
        return f"<CommandLine {self.verb} {self.container_id} {self.options} {self.switches}>"


def parse(arguments: "Sequence[str]") -> CommandLine:
    """Parses what follows the program's name."""
    line = CommandLine()
    index = _take_flags(arguments, 0, GLOBAL_VALUES, GLOBAL_SWITCHES, line)
    if index >= len(arguments) or not line.understood:
        return line
    line.verb, line.verb_index = arguments[index], index
    if line.verb not in OUR_VERBS or line.switches & {"help", "version"}:
        return line
    values, switches = OUR_VERBS[line.verb]
    # newer runc also takes global flags behind the verb
    values, switches = values | GLOBAL_VALUES, switches | GLOBAL_SWITCHES
    rest = reordered(arguments[index + 1 :], values | switches)
    end = _take_flags(rest, 0, values, switches, line)
    operands = rest[end:]
    if len(operands) != 1:
        line.understood = False
    else:
        line.container_id = operands[0]
    return line


def reordered(arguments: "Sequence[str]", flags: "frozenset[str]") -> "list[str]":
    """Known flags first, each with the word behind it, as urfave/cli v1 does (reorderArgs).

    With its quirk: a word behind a flag that takes no value moves to the front too.
    """
    front: list[str] = []
    rest: list[str] = []
    may_be_value = False
    for number, word in enumerate(arguments):
        if word == "--":
            rest += arguments[number:]
            break
        if may_be_value and not word.startswith("-"):
            may_be_value = False
            front.append(word)
        elif _flag_name(word) in flags:
            front.append(word)
            may_be_value = "=" not in word
        else:
            rest.append(word)
    return front + rest


def _take_flags(
    arguments: "Sequence[str]",
    index: int,
    values: "frozenset[str]",
    switches: "frozenset[str]",
    line: CommandLine,
) -> int:
    """Consumes flags as Go's flag package; returns the index of the first word that is none."""
    while index < len(arguments):
        word = arguments[index]
        if word == "--":
            return index + 1
        name = _flag_name(word)
        if not name:  # a plain word, or `-`
            if len(word) > 1 and word.startswith("-"):
                line.understood = False  # `-=`, `---x`: bad flag syntax
            return index
        index += 1
        long_name = _SHORT.get(name, name)
        _, equals, value = word.partition("=")
        if name in switches:
            if not equals or value in ("1", "t", "T", "true", "TRUE", "True"):
                line.switches.add(long_name)
            elif value in ("0", "f", "F", "false", "FALSE", "False"):
                line.switches.discard(long_name)
            else:
                line.understood = False
        elif name in values:
            if not equals:
                if index >= len(arguments):
                    line.understood = False
                    return index
                value = arguments[index]
                index += 1
            line.options[long_name] = value
        else:
            line.understood = False
            return index
    return index


def _flag_name(word: str) -> str:
    """`x` of `-x`, `--x` and `--x=1`; empty for what is no flag."""
    if len(word) < 2 or word[0] != "-":
        return ""
    name = word[2:] if word[1] == "-" else word[1:]
    if not name or name[0] in "-=":
        return ""
    return name.partition("=")[0]
