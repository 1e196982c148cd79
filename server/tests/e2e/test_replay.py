"""A shard that is killed or stops answering is restarted, and every open stream goes on with not one token changed."""

import math
import os
import random
import signal
import threading
from itertools import accumulate, count

import pytest
from test_streams import idle, requests
from tree import Tree, demo_flags, running, together

KILLS = int(os.environ.get("KVRUN_KILLS", "5"))
STREAMS = 16


def check_survival(tree: Tree, faults: int, strike, seed: int) -> int:
    """Strike the shards `faults` times, up to four times a wave of 16 streams, at random moments; compare every stream to itself alone.

    Returns how many streams were compared.
    """
    rng = random.Random(seed)
    struck = compared = 0
    while struck < faults:
        mix = [r | {"max_new_tokens": 200} for r in requests(STREAMS, seed=rng.randrange(2**32))]
        alone = together([lambda r=r: tree.generate(**r) for r in mix])
        assert not [a.error for a in alone if a.error]
        # Counted over all streams, so the next moment comes only after the strike before it was recovered from.
        moments = list(accumulate(rng.randint(100, 400) for _ in range(min(4, faults - struck))))
        wanted, lock, tokens = len(moments), threading.Lock(), count()

        def on_token(_, lock=lock, moments=moments, tokens=tokens):
            with lock:
                if next(tokens) >= (moments[0] if moments else math.inf) and strike(tree, rng):
                    moments.pop(0)

        streams = together([lambda r=r: tree.stream(on_token=on_token, **r) for r in mix])
        for single, stream in zip(alone, streams):
            assert stream.error is None, stream.error
            assert (stream.ids, stream.text, stream.finish, stream.terminals) == (single.ids, single.text, single.finish, 1)
        struck += wanted - len(moments)
        compared += len(streams)
        print(f"{struck} strikes, {compared} streams compared", flush=True)
    return compared


def signal_one(tree: Tree, rng: random.Random, how: int) -> bool:
    """Send a signal to one rank; False when none is running."""
    shards = tree.shards()
    if shards:
        os.kill(rng.choice(shards), how)
    return bool(shards)


def kill_one(tree: Tree, rng: random.Random) -> bool:
    return signal_one(tree, rng, signal.SIGKILL)


def freeze_one(tree: Tree, rng: random.Random) -> bool:
    return signal_one(tree, rng, signal.SIGSTOP)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_shard_costs_no_stream_a_token(ranks):
    with running(*demo_flags(), "--num-shard", str(ranks), "--restart-budget", "0") as tree:
        compared = check_survival(tree, KILLS if ranks == 1 else max(1, KILLS // 5), kill_one, seed=ranks)
        gauges = idle(tree)
        print(f"{compared} streams compared, {gauges.get('kvrun_shard_restarts_total')} restarts")


@pytest.mark.timeout(300)
def test_a_shard_that_hangs_is_found_and_replaced():
    with running(*demo_flags()) as tree:
        check_survival(tree, 1, freeze_one, seed=3)
        idle(tree)
