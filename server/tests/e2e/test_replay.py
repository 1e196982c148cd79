"""A shard that is killed or stops answering is restarted, and every open stream goes on with not one token changed."""

import os
import random
import signal
import threading
import time

import pytest
from test_streams import idle, requests
from tree import Tree, demo_flags, running, together

KILLS = int(os.environ.get("KVRUN_KILLS", "5"))
STREAMS = 16


def check_survival(tree: Tree, faults: int, strike, seed: int) -> int:
    """Strike the shards `faults` times at random moments under 16 streams; the streams that were open at a strike, all compared."""
    rng = random.Random(seed)
    struck = compared = 0
    while struck < faults:
        mix = [r | {"max_new_tokens": 200} for r in requests(STREAMS, seed=rng.randrange(2**32))]
        alone = together([lambda r=r: tree.generate(**r) for r in mix])
        assert not [a.error for a in alone if a.error]
        hit, target = threading.Event(), rng.randint(1, 40)

        def on_token(answer, hit=hit, target=target):
            if len(answer.ids) == target and not hit.is_set():
                hit.set()
                strike(tree, rng)

        streams = together([lambda r=r, cb=on_token: tree.stream(on_token=cb, **r) for r in mix])
        for single, stream in zip(alone, streams):
            assert stream.error is None, stream.error
            assert (stream.ids, stream.text, stream.finish, stream.terminals) == (single.ids, single.text, single.finish, 1)
        struck += hit.is_set()
        compared += len(streams)
        time.sleep(0.05)
    return compared


def kill_one(tree: Tree, rng: random.Random) -> None:
    os.kill(rng.choice(tree.shards()), signal.SIGKILL)


def freeze_one(tree: Tree, rng: random.Random) -> None:
    os.kill(rng.choice(tree.shards()), signal.SIGSTOP)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_shard_costs_no_stream_a_token(ranks):
    with running(*demo_flags(), "--num-shard", str(ranks), "--restart-budget", "0") as tree:
        count = check_survival(tree, KILLS if ranks == 1 else max(1, KILLS // 5), kill_one, seed=ranks)
        gauges = idle(tree)
        print(f"{count} streams compared over kills; restarts {gauges.get('kvrun_shard_restarts_total')}")


@pytest.mark.timeout(300)
def test_a_shard_that_hangs_is_found_and_replaced():
    with running(*demo_flags()) as tree:
        check_survival(tree, 1, freeze_one, seed=3)
        idle(tree)
