"""`xeon-run`: what it chooses on machines of all kinds, and what it does here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sq_cpu_machine import Choice, MachineError, Topology, choose, ranges

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "xeon-run"


class Tree:
    """Files as the kernel gives them: /sys and /proc of a machine, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")

    def write(self, path: str, text: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    def cores(self, *cores: tuple[int, int, tuple[int, ...]]) -> None:
        """Lay out cores: their socket, node and hardware threads."""
        cpus: dict[int, list[int]] = {}
        for socket, node, own in cores:
            cpus.setdefault(node, []).extend(own)
            for cpu in own:
                topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
                self.write(f"{topology}/physical_package_id", str(socket))
                self.write(f"{topology}/core_cpus_list", ranges(sorted(own)))
        for node, own in cpus.items():
            self.write(f"sys/devices/system/node/node{node}/cpulist", ranges(sorted(own)))
        every = ranges(sorted(cpu for own in cpus.values() for cpu in own))
        self.write("sys/devices/system/cpu/online", every)
        self.write("sys/devices/system/node/has_memory", ranges(sorted(cpus)))
        self.allow(every, ranges(sorted(cpus)))

    def allow(self, cpus: str, nodes: str) -> None:
        status = f"Name:\tcat\nCpus_allowed_list:\t{cpus}\nMems_allowed_list:\t{nodes}"
        self.write("proc/self/status", status)

    def choice(self, environ: dict[str, str] | None = None, **options: Any) -> Choice:
        return choose(Topology.read(self.root), environ or {}, root=self.root, **options)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def two_sockets(tree: Tree) -> None:
    """Two sockets of four cores with two threads each, numbered as Linux does it on a Xeon."""
    tree.cores(*((core // 4, core // 4, (core, core + 8)) for core in range(8)))


def test_one_thread_of_each_core_of_a_socket(tree: Tree) -> None:
    two_sockets(tree)
    choice = tree.choice()
    assert (choice.socket, choice.cpus, choice.threads) == (0, (0, 1, 2, 3), 4)
    assert choice.nodes == (0,)
    assert choice.environment["OMP_NUM_THREADS"] == "4"
    assert choice.reasons["cores"] == (
        "0-3: the 4 cores of socket 0, one hardware thread each: two would share its multipliers; "
        "for another command: --socket 1"
    )
    other = tree.choice(socket=1)
    assert (other.cpus, other.nodes) == ((4, 5, 6, 7), (1,))
    few = tree.choice(socket=1, cores=3)
    assert (few.cpus, few.threads) == ((4, 5, 6), 3)
    assert few.reasons["cores"].startswith("4-6: 3 of 4 cores of socket 1")


def test_sub_numa_clustering(tree: Tree) -> None:
    tree.cores(*((core // 4, core // 2, (core, core + 8)) for core in range(8)))
    choice = tree.choice(socket=1)
    assert (choice.cpus, choice.nodes) == ((4, 5, 6, 7), (2, 3))
    assert tree.choice(cores=2).nodes == (0,)


def test_cores_of_a_container(tree: Tree) -> None:
    """Half of a core counts as one, and the socket with most of them is taken."""
    two_sockets(tree)
    tree.allow("3,5-7,11,13", "0-1")
    choice = tree.choice()
    assert (choice.socket, choice.cpus, choice.nodes) == (1, (5, 6, 7), (1,))
    assert tree.choice(socket=0).cpus == (3,)
    tree.allow("11-15", "0")
    choice = tree.choice()
    assert (choice.cpus, choice.nodes) == ((12, 13, 14, 15), ())
    assert choice.reasons["memory"] == "not bound: of nodes 1, this process may use 0"


@pytest.mark.parametrize(
    "files",
    [
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "350000 100000"},
        {
            "proc/self/cgroup": "0::/user/job",
            "sys/fs/cgroup/user/job/cpu.max": "max 100000",
            "sys/fs/cgroup/user/cpu.max": "350000 100000",
        },
        {
            "proc/self/cgroup": "3:cpuset:/a\n2:cpu,cpuacct:/docker/1f\n0::/",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "350000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        {
            "proc/self/cgroup": "1:cpu:/a/b",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "175000",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "50000",
        },
    ],
    ids=["v2", "v2 above", "v1 in a container", "v1 above"],
)
def test_a_quota_limits_threads_and_not_cores(tree: Tree, files: dict[str, str]) -> None:
    """Containers of one machine that took its first cores would all be on the same ones."""
    two_sockets(tree)
    for path, text in files.items():
        tree.write(path, text)
    choice = tree.choice()
    assert (choice.cpus, choice.threads) == ((0, 1, 2, 3), 3)
    assert "the control group grants 3.5 CPUs" in choice.reasons["threads"]
    assert tree.choice(cores=4).threads == 4
    assert tree.choice(cores=3).reasons["threads"] == "3: one a core"


@pytest.mark.parametrize(("quota", "threads"), [("20000 100000", 1), ("max 100000", 4), ("x", 4)])
def test_other_quotas(tree: Tree, quota: str, threads: int) -> None:
    two_sockets(tree)
    tree.write("proc/self/cgroup", "0::/")
    tree.write("sys/fs/cgroup/cpu.max", quota)
    assert tree.choice().threads == threads


def test_offline_cores(tree: Tree) -> None:
    two_sockets(tree)
    tree.write("sys/devices/system/cpu/online", "1-3,8,11-15")
    choice = tree.choice()
    # The first thread of core 0 is off, the other is not; both of socket 1's are, but one each.
    assert (choice.socket, choice.cpus) == (0, (1, 2, 3, 8))


def test_efficient_cores_are_left_out(tree: Tree) -> None:
    tree.cores(*((0, 0, (2 * i, 2 * i + 1)) for i in range(4)), *((0, 0, (i,)) for i in (8, 9)))
    tree.write("sys/devices/cpu_core/cpus", "0-7")
    tree.write("sys/devices/cpu_atom/cpus", "8-9")
    choice = tree.choice()
    assert choice.cpus == (0, 2, 4, 6)
    assert "2 efficient cores are left out" in choice.reasons["cores"]
    tree.allow("8-9", "0")
    assert tree.choice().cpus == (8, 9)


def test_no_sys_at_all(tmp_path: Path) -> None:
    topology = Topology.read(tmp_path)
    choice = choose(topology, {}, root=tmp_path)
    assert choice.cpus == tuple(sorted(os.sched_getaffinity(0)))
    assert choice.nodes == ()
    assert "/sys does not say" in choice.reasons["cores"]
    assert choice.reasons["huge pages"] == "what the kernel gives is not known"


@pytest.mark.parametrize("setting", ["always", "madvise", "never"])
def test_huge_pages(tree: Tree, setting: str) -> None:
    two_sockets(tree)
    words = " ".join(f"[{w}]" if w == setting else w for w in ("always", "madvise", "never"))
    tree.write("sys/kernel/mm/transparent_hugepage/enabled", words)
    environment = tree.choice().environment
    asks = setting == "madvise"
    assert ("THP_MEM_ALLOC_ENABLE" in environment) == asks
    assert ("glibc.malloc.hugetlb=1" in environment["GLIBC_TUNABLES"]) == asks


def test_allocators(tree: Tree) -> None:
    two_sockets(tree)
    assert "LD_PRELOAD" not in tree.choice().environment
    tree.write("usr/lib64/libjemalloc.so.2", "")
    jemalloc = str(tree.root / "usr/lib64/libjemalloc.so.2")
    made = tree.choice().environment
    assert made["LD_PRELOAD"] == jemalloc
    assert "dirty_decay_ms:-1" in made["MALLOC_CONF"]
    assert "GLIBC_TUNABLES" not in made
    assert tree.choice({"LD_PRELOAD": "/a.so"}).environment["LD_PRELOAD"] == f"/a.so:{jemalloc}"
    tree.write("usr/local/lib/libtcmalloc_minimal.so.4", "")
    assert "tcmalloc" in tree.choice().environment["LD_PRELOAD"]


def test_what_is_set_stays(tree: Tree) -> None:
    two_sockets(tree)
    own = {"OMP_NUM_THREADS": "2", "GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}
    choice = tree.choice(own)
    assert choice.threads == 2
    assert "OMP_NUM_THREADS" not in choice.environment
    first, *more = choice.environment["GLIBC_TUNABLES"].split(":")
    assert first == own["GLIBC_TUNABLES"]
    assert not any("trim_threshold" in each for each in more)
    assert tree.choice({"OMP_NUM_THREADS": "9" * 5000}).threads == 4
    kept = tree.choice({"LD_PRELOAD": "/x/libmimalloc.so", "THP_MEM_ALLOC_ENABLE": "0"})
    assert kept.environment.keys() == {"OMP_NUM_THREADS"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"socket": 2}, "no core of socket 2 is available here: give --socket 0, 1"),
        ({"socket": -1}, "no core of socket -1 is available here: give --socket 0, 1"),
        ({"cores": 0}, "socket 0 has 4 cores here: give --cores 1..4"),
        ({"cores": 5, "socket": 1}, "socket 1 has 4 cores here: give --cores 1..4"),
    ],
)
def test_what_is_not_here(tree: Tree, options: dict[str, int], message: str) -> None:
    two_sockets(tree)
    with pytest.raises(MachineError, match=f"^{message}$"):
        tree.choice(**options)


def test_installation_declares_the_script() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((SCRIPT.parents[1] / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["xeon-run"] == "sq_cpu_xeon_run:main"


# --- the command, on this machine -----------------------------------------------------------------


def started(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments], capture_output=True, text=True, check=False, **options
    )


_SEEN = "import json, os; print(json.dumps([sorted(os.sched_getaffinity(0)), dict(os.environ)]))"


def test_the_command_is_bound() -> None:
    choice = choose(Topology.read(), {}, cores=1)
    environ = {"PATH": os.environ["PATH"]}
    done = started("--cores", "1", "--", sys.executable, "-c", _SEEN, env=environ)
    assert done.returncode == 0
    affinity, seen = json.loads(done.stdout)
    assert affinity == [*choice.cpus]
    assert choice.environment.items() <= seen.items()
    assert seen["OMP_NUM_THREADS"] == "1"
    lines = done.stderr.splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        *("cores", "threads", "memory", "huge pages", "allocator", "sets")
    ]


def test_memory_is_bound() -> None:
    """In a process of its own, to the first node, which each machine has."""
    program = (
        "from sq_cpu_xeon_run import _bind_memory; print(_bind_memory([0])); "
        "print(open('/proc/self/numa_maps').readline())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    refused, *maps = done.stdout.splitlines()
    if refused:
        assert refused.startswith("not bound to nodes 0: ")
        pytest.skip(refused)
    assert "bind:0" in maps[0]


def test_exit_codes_and_signals_are_the_commands() -> None:
    assert started("sh", "-c", "exit 7").returncode == 7
    assert started("sh", "-c", "kill -TERM $$").returncode == -signal.SIGTERM
    # As a shell starts it: a pipe that nobody reads ends it.
    piped = started("sh", "-c", "yes | head -n 1; grep SigIgn /proc/self/status")
    line, name, ignored = piped.stdout.split()
    assert (line, name) == ("y", "SigIgn:")
    here = Path("/proc/self/status").read_text(encoding="utf-8").split("SigIgn:")[1].split()[0]
    pipe = 1 << (signal.SIGPIPE - 1)  # Python's own, which a child gets back
    assert int(ignored, 16) & ~(int(here, 16) & ~pipe) == 0


def test_arguments_are_passed_as_they_are() -> None:
    odd = ["--json", "-x", "", "a b", "\udcff", "$HOME"]
    done = started("--", sys.executable, "-c", "import sys; print(ascii(sys.argv[1:]))", *odd)
    assert done.stdout == f"{odd!a}\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--"], 2),
        (["--cores"], 2),
        (["--cores", "two", "true"], 2),
        (["--cores", "1" * 5000, "true"], 2),
        (["--sock", "0", "true"], 2),
        (["--nonsense", "true"], 2),
        (["--cores", "0", "true"], 1),
        (["--cores", "-1", "true"], 1),
        (["--socket", "99", "true"], 1),
        (["no-such-program"], 127),
        ([""], 127),
        (["/"], 127),
        (["/dev/null"], 127),
        (["no\nsuch\x1b[31m"], 127),
    ],
)
def test_what_cannot_be_is_one_line(arguments: list[str], code: int) -> None:
    done = started(*arguments)
    assert done.returncode == code
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.isprintable()
    assert len(line) < 300


@pytest.mark.parametrize("option", ["--dry-run", "--json", "--help"])
def test_a_reader_that_goes_away(option: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'{{ sleep 0.1; "$0" {option}; }} | true', SCRIPT],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""


def test_a_file_that_is_no_program(tmp_path: Path) -> None:
    file = tmp_path / "program"
    file.write_text("nonsense")
    file.chmod(0o755)
    done = started(str(file))
    assert done.returncode == 126
    assert done.stderr.splitlines()[-1] == f"error: cannot run {str(file)!r}: Exec format error"


def test_dry_runs_run_nothing_and_torch_is_not_imported(tmp_path: Path) -> None:
    file = tmp_path / "file"
    shown = started("--dry-run", "touch", str(file)).stdout.splitlines()
    assert shown == choose(Topology.read(), os.environ).lines()
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--json", "touch", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["cpus"]
    assert "sq_cpu_machine" in done.stderr
    assert "torch" not in done.stderr
    assert not file.exists()
