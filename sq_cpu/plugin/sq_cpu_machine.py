"""How a command best runs on this machine: on which cores and memory, with what settings, and why.

It reads /sys and /proc and imports little, so that it can be asked before torch is imported.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Choice", "Core", "MachineError", "Topology", "choose", "ranges"]

_HUGE_PAGES = "sys/kernel/mm/transparent_hugepage/enabled"
_ALLOCATORS = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")
_FOLDERS = ("usr/local/lib", "usr/lib/x86_64-linux-gnu", "usr/lib64", "usr/lib")
# jemalloc otherwise gives freed memory back after 10 s, and the next call faults it in again.
_JEMALLOC = "background_thread:true,metadata_thp:auto,dirty_decay_ms:-1,muzzy_decay_ms:-1"
# glibc maps larger blocks anew each time; 32 MiB is the most that it takes.
_KEPT_BY_GLIBC = {"mmap_threshold": 32 << 20, "trim_threshold": 128 << 20}


class MachineError(Exception):
    """What was asked for is not here; the message is one line."""


@dataclass(frozen=True)
class Core:
    """A physical core, as far as this process may use it."""

    cpus: tuple[int, ...]
    """Its hardware threads, ascending."""
    socket: int
    node: int | None
    """Of the memory beside it; None where that is not known."""
    is_efficient: bool
    """Whether it is one of the slower cores of a hybrid processor."""


@dataclass(frozen=True)
class Topology:
    """What this process may use of a machine."""

    cores: tuple[Core, ...]
    nodes: tuple[int, ...]
    """NUMA nodes of the machine that have memory."""
    nodes_allowed: tuple[int, ...]
    quota: float | None
    """CPUs' worth of time that the control groups grant; None: no limit."""
    huge_pages: str | None
    """The kernel's setting: "always", "madvise" or "never"; None where it is not known."""
    is_known: bool
    """Whether /sys says which hardware threads are of one core."""

    @classmethod
    def read(cls, root: str | os.PathLike[str] = "/") -> Topology:
        """Read the files below `root`."""
        root = Path(root)
        system = root / "sys/devices/system"
        allowed = _status(root, "Cpus_allowed_list") or sorted(os.sched_getaffinity(0))
        online = _numbers(_text(system / "cpu/online"))
        cpus = [cpu for cpu in allowed if cpu in online] or allowed
        beside = {
            cpu: int(folder.name[4:])
            for folder in sorted((system / "node").glob("node[0-9]*"))
            for cpu in _numbers(_text(folder / "cpulist"))
        }
        efficient = {*_numbers(_text(root / "sys/devices/cpu_atom/cpus"))}
        threads: dict[tuple[int, int], list[int]] = {}
        known = False
        for cpu in cpus:
            folder = system / f"cpu/cpu{cpu}/topology"
            siblings = _numbers(_text(folder / "core_cpus_list"))
            siblings = siblings or _numbers(_text(folder / "thread_siblings_list"))
            known = known or bool(siblings)
            socket = max(0, _whole(folder / "physical_package_id"))
            threads.setdefault((socket, min(siblings, default=cpu)), []).append(cpu)
        cores = (
            Core(tuple(sorted(own)), socket, beside.get(own[0]), own[0] in efficient)
            for (socket, _), own in threads.items()
        )
        setting = re.search(r"\[(\w+)\]", _text(root / _HUGE_PAGES))
        return cls(
            cores=tuple(sorted(cores, key=lambda core: (core.socket, core.node or 0, core.cpus))),
            nodes=tuple(_numbers(_text(system / "node/has_memory"))),
            nodes_allowed=tuple(_status(root, "Mems_allowed_list")),
            quota=_quota(root),
            huge_pages=None if setting is None else setting[1],
            is_known=known,
        )


@dataclass(frozen=True)
class Choice:
    """What to bind a command to, and what to set for it."""

    socket: int
    cpus: tuple[int, ...]
    threads: int
    nodes: tuple[int, ...]
    """That all memory is to come from; none: whatever the kernel gives."""
    environment: Mapping[str, str]
    """Variables to set beside those that are."""
    reasons: Mapping[str, str]
    """A line each: what is chosen and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return the reasons and the settings, a line each."""
        settings = " ".join(f"{name}={value}" for name, value in self.environment.items())
        reasons = [f"{what}: {why}" for what, why in self.reasons.items()]
        return [*reasons, f"sets: {settings or 'nothing'}"]


def choose(
    topology: Topology,
    environ: Mapping[str, str],
    *,
    socket: int | None = None,
    cores: int | None = None,
    root: str | os.PathLike[str] = "/",
) -> Choice:
    """Choose cores, memory and settings for a command that is to have one socket.

    Parameters
    ----------
    environ : the command's variables: what is set there stays
    socket : None: that with the most cores, the first of such
    cores : how many of the socket's; None: all
    root : what libraries are looked for below

    Raises
    ------
    MachineError
        For a socket or cores that are not here.
    """
    by_socket: dict[int, list[Core]] = {}
    for core in topology.cores:
        by_socket.setdefault(core.socket, []).append(core)
    if socket is None:
        socket = max(by_socket, key=lambda each: len(_fast(by_socket[each])))
    if socket not in by_socket:
        here = ", ".join(map(str, by_socket))
        raise MachineError(f"no core of socket {socket} is available here: give --socket {here}")
    own = _fast(by_socket[socket])
    if cores is not None and not 1 <= cores <= len(own):
        raise MachineError(f"socket {socket} has {len(own)} cores here: give --cores 1..{len(own)}")
    taken = own[:cores]
    reasons = {"cores": _why_cores(topology, socket, by_socket, taken)}
    threads, reasons["threads"] = _threads(topology, environ, len(taken), cores is not None)
    nodes, reasons["memory"] = _memory(topology, taken)
    settings: dict[str, str] = {}
    if "OMP_NUM_THREADS" not in environ:
        settings["OMP_NUM_THREADS"] = str(threads)
    library = _library(root, environ)
    made, reasons["huge pages"] = _huge_pages(topology, environ)
    settings |= made
    made, reasons["allocator"] = _allocator(library, environ, topology.huge_pages == "madvise")
    settings |= made
    cpus = tuple(core.cpus[0] for core in taken)
    return Choice(socket, cpus, threads, nodes, settings, reasons)


def ranges(numbers: Iterable[int]) -> str:
    """Return ascending numbers as the kernel writes them, as in "0-3,8"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _fast(cores: list[Core]) -> list[Core]:
    """Return the cores without the efficient ones: where work is split evenly, these are late."""
    return [core for core in cores if not core.is_efficient] or cores


def _why_cores(
    topology: Topology, socket: int, by_socket: Mapping[int, list[Core]], taken: list[Core]
) -> str:
    own = _fast(by_socket[socket])
    count = f"{len(taken)} of {len(own)} cores" if len(taken) < len(own) else _cores(len(own))
    text = f"{ranges(core.cpus[0] for core in taken)}: {count} of socket {socket}"
    if not topology.is_known:
        return f"{text}; /sys does not say which are of one core, so each counts as one"
    if any(len(core.cpus) > 1 for core in taken):
        text += ", one hardware thread each: two would share its multipliers"
    if left := len(by_socket[socket]) - len(own):
        text += f"; {left} efficient cores are left out: the others would wait for them"
    if others := [each for each in by_socket if each != socket]:
        text += f"; for another command: --socket {' or '.join(map(str, others))}"
    return text


def _cores(count: int) -> str:
    return "the 1 core" if count == 1 else f"the {count} cores"


def _threads(
    topology: Topology, environ: Mapping[str, str], cores: int, is_asked: bool
) -> tuple[int, str]:
    quota = topology.quota
    limited = quota is not None and quota < cores
    limit = "" if quota is None else f"the control group grants {quota:g} CPUs"
    if "OMP_NUM_THREADS" in environ:
        given = environ["OMP_NUM_THREADS"]
        count = int(given) if re.fullmatch(r"\d{1,6}", given) else cores
        return count, f"OMP_NUM_THREADS is {given!r} already, and stays"
    if limited and not is_asked:
        assert quota is not None
        count = max(1, math.floor(quota))
        return count, f"{count}: {limit}, and more threads would be stopped in turns"
    if limited:
        return cores, f"{cores}: one a core, as asked; {limit}, so they are stopped in turns"
    return cores, f"{cores}: one a core"


def _memory(topology: Topology, taken: list[Core]) -> tuple[tuple[int, ...], str]:
    beside = sorted({core.node for core in taken if core.node is not None})
    if len(topology.nodes) < 2 or not beside:
        return (), "not bound: the machine has one node"
    nodes = tuple(node for node in beside if node in topology.nodes_allowed)
    if not nodes:
        allowed = ranges(topology.nodes_allowed) or "none"
        return (), f"not bound: of nodes {ranges(beside)}, this process may use {allowed}"
    if len(nodes) == 1:
        return nodes, f"of node {nodes[0]}, beside the cores"
    return nodes, f"of nodes {ranges(nodes)}, each page beside the core that is the first to use it"


def _huge_pages(topology: Topology, environ: Mapping[str, str]) -> tuple[dict[str, str], str]:
    setting = topology.huge_pages
    if setting == "madvise":
        name = "THP_MEM_ALLOC_ENABLE"  # torch's, of tensors from 2 MiB
        made = {} if name in environ else {name: "1"}
        return made, "the kernel gives them where asked: for tensors, by torch"
    if setting == "always":
        return {}, "the kernel gives them wherever it can"
    if setting == "never":
        return {}, f"the kernel gives none: echo madvise > /{_HUGE_PAGES} (as root)"
    return {}, "what the kernel gives is not known"


def _library(root: str | os.PathLike[str], environ: Mapping[str, str]) -> str | None:
    """Return the path of an allocator made for many threads, if there is one."""
    folders = [Path(root) / folder for folder in _FOLDERS]
    if "CONDA_PREFIX" in environ:
        folders.insert(0, Path(environ["CONDA_PREFIX"]) / "lib")
    for path in (str(folder / name) for folder in folders for name in _ALLOCATORS):
        if os.path.isfile(path) and not re.search("[: ]", path):  # which part LD_PRELOAD's list
            return path
    return None


def _allocator(
    library: str | None, environ: Mapping[str, str], ask_for_huge_pages: bool
) -> tuple[dict[str, str], str]:
    before = environ.get("LD_PRELOAD", "")
    if re.search("malloc|asan", before):
        return {}, f"LD_PRELOAD is {before!r} already, and stays"
    if library is not None:
        made = {"LD_PRELOAD": f"{before}:{library}" if before else library}
        if "jemalloc" in library and "MALLOC_CONF" not in environ:
            made["MALLOC_CONF"] = _JEMALLOC
        return made, f"{library}, which keeps what is freed"
    before = environ.get("GLIBC_TUNABLES", "")
    wanted = _KEPT_BY_GLIBC | ({"hugetlb": 1} if ask_for_huge_pages else {})
    tunables = [f"glibc.malloc.{name}={value}" for name, value in wanted.items()]
    added = [each for each in tunables if each.partition("=")[0] not in before]
    text = "glibc's, told to keep what is freed: neither tcmalloc nor jemalloc is installed"
    if not added:
        return {}, f"GLIBC_TUNABLES is {before!r} already, and stays"
    return {"GLIBC_TUNABLES": ":".join([*filter(None, [before]), *added])}, text


# --- files of the kernel ------------------------------------------------------------------------


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


def _whole(path: Path) -> int:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else 0


def _numbers(text: str) -> list[int]:
    """Read a list as in "0-3,8"; nothing of what is none."""
    found: list[int] = []
    for part in text.split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip()):
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _status(root: Path, name: str) -> list[int]:
    """Return a list of numbers that /proc/self/status has."""
    for line in _text(root / "proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return _numbers(value)
    return []


def _quota(root: Path) -> float | None:
    """Return the least limit of CPU time of this process's control groups and those above."""
    limits = [limit for folder in _groups(root) for limit in _limits(folder)]
    return min(limits, default=None)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that could limit CPU time, and of those above."""
    top = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = [controllers, *controllers.split(",")] if controllers else ["", "unified"]
        for name in dict.fromkeys(names):
            # In a container the path may be the host's, and the files those of the mount itself.
            group = Path(path.lstrip("/"))
            yield from (top / name / each for each in (group, *group.parents))


def _limits(folder: Path) -> Iterator[float]:
    quota, _, period = _text(folder / "cpu.max").partition(" ")  # version 2
    if not quota:
        quota = _text(folder / "cpu.cfs_quota_us")
        period = _text(folder / "cpu.cfs_period_us")
    if quota.isdecimal() and period.isdecimal() and int(quota) and int(period):
        yield int(quota) / int(period)
