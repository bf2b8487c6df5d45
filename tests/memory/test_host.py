"""What a process may use of the host's memory: the least limit of its control groups."""

import os

import pytest

from peft_longlora.memory import host

GIB = 2**30
JOB = "system.slice/slurmstepd.scope/job_7"


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A machine's control groups: the process's lines, and the files that hold limits."""
    monkeypatch.setattr(host, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(host, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(host.os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**26, "SC_PAGE_SIZE": 4096}[name])

    def make(own: str, **limits: object) -> None:
        (tmp_path / "own").write_text(own)
        for path, limit in limits.items():
            file = tmp_path / "groups" / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{limit}\n")

    return make


@pytest.mark.parametrize(
    ("own", "limits", "least"),
    [
        ("0::/\n", {}, 256),
        ("0::/\n", {"memory.max": "max"}, 256),
        ("0::/\n", {"memory.max": 64 * GIB}, 64),  # a container
        (f"0::/{JOB}/step_0/user/task_0\n", {f"{JOB}/memory.max": 32 * GIB, "other/memory.max": GIB}, 32),  # a job
        (f"0::/{JOB}/step_0\n", {f"{JOB}/memory.max": 32 * GIB, f"{JOB}/step_0/memory.max": 16 * GIB}, 16),
        ("4:memory:/job_7/step_0\n0::/\n", {"memory/job_7/memory.limit_in_bytes": 8 * GIB}, 8),  # the first version
        ("5:cpu,memory:/job_7\n", {"memory/memory.limit_in_bytes": 2**63 - 4096}, 256),
        ("3:cpu:/job_7\n", {"memory/job_7/memory.limit_in_bytes": 8 * GIB}, 256),
        ("0::/gone\n", {"memory.max": 24 * GIB}, 24),  # a path of the machine, which the container does not see
    ],
)
def test_the_least_limit_around_the_process_holds(groups, monkeypatch, own, limits, least):
    groups(own, **limits)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert host.host_budget() == int(0.75 * least * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert host.host_budget() == int(0.75 * least * GIB / 4)


def test_elsewhere_the_machine_is_the_limit(groups):
    assert host.memory_limits() == []  # no such file


def test_this_machine():
    assert 0 < host.host_budget() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
