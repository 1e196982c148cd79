"""A server without work sleeps: nothing in any of its processes wakes by the clock."""

import time
from pathlib import Path

from tree import descendants

SECONDS = 5
SLEEPS = 3  # of a whole process, each after it woke; one clock that ticks every second makes it five


def sleeps(pid: int) -> dict[tuple[str, str], int]:
    """How often each thread of a process has gone to sleep, by its id and name."""
    found = {}
    for task in (Path("/proc") / str(pid) / "task").iterdir():
        facts = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        found[task.name, facts["Name"]] = int(facts["voluntary_ctxt_switches"])
    return found


def test_nothing_wakes_a_server_without_requests(demo):
    assert demo.generate("Once upon a time", max_new_tokens=8).error is None
    processes = [demo.process.pid, *descendants(demo.process.pid)]
    assert len(processes) == 3
    time.sleep(2)  # until what the request left behind is put away
    before = [sleeps(pid) for pid in processes]
    time.sleep(SECONDS)
    for pid, earlier in zip(processes, before, strict=True):
        woken = {thread: count - earlier.get(thread, 0) for thread, count in sleeps(pid).items()}
        said = {thread: count for thread, count in woken.items() if count}
        assert sum(woken.values()) <= SLEEPS, f"{(Path('/proc') / str(pid) / 'comm').read_text().strip()}: {said}"
