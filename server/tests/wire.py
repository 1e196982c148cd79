"""Shard processes and the router's side of the wire: what tests speak to them with."""

import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpclib.health.v1 import health_pb2
from kvrun.engine.sampling import Sampling, TokenLogprob
from kvrun.engine.sequence import Outcome, RowOutcome, Step
from kvrun.rpc.pb import model_shard_pb2 as pb
from kvrun.rpc.pb import model_shard_pb2_grpc as rpc

ROOT = Path(__file__).resolve().parents[2]
SERVING = health_pb2.HealthCheckResponse.SERVING


def spawn(*args: object, env: dict | None = None, **popen) -> subprocess.Popen:
    """Start text-generation-server with these arguments; its stderr is a pipe."""
    path = os.pathsep.join([str(ROOT / "server"), str(ROOT / "kernels")])
    environ = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, "-m", "kvrun", *map(str, args)]
    return subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **popen)


class Shard:
    """A shard process of one rank and a client of it."""

    def __init__(self, folder: Path, socket: Path, *args: object, **options) -> None:
        self.socket = socket
        flags = ["--dtype", "float32", "--page-tokens", 4, "--num-threads", 1, "--json-output", "--model-id", "tiny"]
        self.process = spawn("serve", folder, "--uds-path", socket, *flags, *args, **options)
        self.channel = grpc.insecure_channel(f"unix:{socket}")
        self.calls = rpc.ModelShardStub(self.channel)
        self.check = self.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )

    def status(self, service: str = "kvrun.v1.ModelShard") -> int:
        """What the health service says."""
        return self.check(health_pb2.HealthCheckRequest(service=service), wait_for_ready=True).status

    def ready(self, seconds: float = 120) -> "Shard":
        """Wait until it serves."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if self.status() == SERVING:
                    return self
            except grpc.RpcError:
                pass
            time.sleep(0.05)
        raise AssertionError(
            f"not ready: exit code {self.process.poll()}\n{self.process.stderr.read() if self.process.poll() is not None else ''}"
        )

    def reserve(self, epoch: int, pages: int = 600) -> pb.Reservation:
        """Begin an epoch."""
        return self.calls.Reserve(pb.ReserveRequest(epoch=epoch, pages=pages, step_tokens=512, sequences=64, adapter_bytes=1 << 24))

    def run(self, epoch: int) -> "Steps":
        """Open the step stream of an epoch."""
        return Steps(self, epoch)

    def end(self) -> None:
        """End the process, whatever it does."""
        self.channel.close()
        self.process.kill()
        self.process.communicate()


class Steps:
    """The step stream of one shard."""

    def __init__(self, shard: Shard, epoch: int) -> None:
        self.epoch = epoch
        self.sent: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes = shard.calls.Run(iter(self.sent.get, None))

    def send(self, step: Step) -> None:
        """Send a step without waiting for its outcome."""
        self.sent.put(to_pb(self.epoch, step))

    def receive(self) -> Outcome:
        """The next outcome."""
        return from_pb(next(self.outcomes))

    def step(self, step: Step) -> Outcome:
        """Send a step and wait for its outcome."""
        self.send(step)
        return self.receive()

    def close(self) -> None:
        """End the stream from the router's side."""
        self.sent.put(None)


def to_pb(epoch: int, step: Step) -> pb.Step:
    """A step as the router writes it."""
    return pb.Step(
        epoch=epoch,
        number=step.number,
        release=step.release,
        admit=[
            pb.Admit(
                sequence=a.sequence,
                tokens=a.tokens,
                prompt_tokens=a.prompt_tokens,
                sampling=_sampling(a.sampling),
                adapter=a.adapter,
                memory_tokens=a.memory_tokens,
                memory_pages=a.memory_pages,
                long=a.long,
            )
            for a in step.admit
        ],
        rows=[
            pb.Row(sequence=r.sequence, start=r.start, tokens=r.tokens, pages=r.pages, sample=r.sample, drafts=r.drafts) for r in step.rows
        ],
    )


def _sampling(s: Sampling) -> pb.Sampling:
    return pb.Sampling(**{name: getattr(s, name) for name in s.__dataclass_fields__})


def from_pb(outcome: pb.Outcome) -> Outcome:
    """An outcome as the router reads it."""

    def tokens(found) -> list[TokenLogprob]:
        return [TokenLogprob(t.id, t.logprob, [(a.id, a.logprob) for a in t.top]) for t in found]

    rows = [RowOutcome(row.sequence, tokens(row.tokens), tokens(row.prompt), row.error) for row in outcome.rows]
    return Outcome(outcome.number, rows, outcome.forward_us, outcome.sample_us)


@contextmanager
def group(folder: Path, at: Path, world: int) -> Iterator[list[Shard]]:
    """A group of shards that is ready, ended with the block."""
    flags = ["--world-size", world, "--rendezvous", at / "rendezvous"]
    shards = [Shard(folder, at / f"shard-{rank}", "--rank", rank, *flags) for rank in range(world)]
    try:
        yield [shard.ready() for shard in shards]
    finally:
        for shard in shards:
            shard.end()
