"""Messages of the wire into the engine's types and back, and which error answers with which status."""

from __future__ import annotations

from grpclib import Status

from kvrun import errors
from kvrun.engine.images import Image
from kvrun.engine.sampling import Sampling, TokenLogprob
from kvrun.engine.sequence import Admit, Outcome, Placement, Row, RowOutcome, Step
from kvrun.rpc.pb import model_shard_pb2 as pb

# The first row that an error is an instance of decides.
STATUS: tuple[tuple[type[BaseException], Status], ...] = (
    (errors.AdapterNotFound, Status.NOT_FOUND),
    (errors.AdapterTooLarge, Status.RESOURCE_EXHAUSTED),
    (errors.AdapterError, Status.INVALID_ARGUMENT),
    (errors.ProtocolError, Status.INVALID_ARGUMENT),
    (errors.StaleEpoch, Status.ABORTED),
)


def status(error: BaseException) -> Status:
    """The status an error answers with; INTERNAL for one that has no name."""
    if errors.is_out_of_memory(error):
        return Status.RESOURCE_EXHAUSTED
    return next((code for kind, code in STATUS if isinstance(error, kind)), Status.INTERNAL)


def to_step(message: pb.Step) -> Step:
    """A step; raises ProtocolError where a sampling setting is out of range."""
    return Step(
        number=message.number,
        release=message.release,
        admit=[to_admit(admit) for admit in message.admit],
        rows=[Row(row.sequence, row.start, row.tokens, row.pages, row.sample, row.drafts) for row in message.rows],
        displace=message.displace,
        place=[Placement(place.adapter, place.first) for place in message.place],
    )


def to_admit(message: pb.Admit) -> Admit:
    """A sequence to begin."""
    s = message.sampling
    sampling = Sampling(
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        typical_p=s.typical_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        seed=s.seed,
        logit_bias=dict(s.logit_bias),
        suppressed=tuple(s.suppressed),
        suppressed_until=s.suppressed_until,
        top_logprobs=s.top_logprobs,
        prompt_logprobs=s.prompt_logprobs,
    )
    images = [Image(image.data, image.at, image.tokens) for image in message.images]
    source = list(message.memory_tokens), list(message.memory_pages)
    return Admit(message.sequence, list(message.tokens), message.prompt_tokens, sampling, message.adapter, images, *source, message.long)


def from_outcome(epoch: int, outcome: Outcome, compute_us: int) -> pb.Outcome:
    """The answer to a step."""
    return pb.Outcome(
        epoch=epoch,
        number=outcome.number,
        rows=[_row(row) for row in outcome.rows],
        compute_us=compute_us,
        forward_us=outcome.forward_us,
        sample_us=outcome.sample_us,
    )


def _row(row: RowOutcome) -> pb.RowOutcome:
    return pb.RowOutcome(
        sequence=row.sequence, tokens=[_token(t) for t in row.tokens], prompt=[_token(t) for t in row.prompt], error=row.error
    )


def _token(token: TokenLogprob) -> pb.Token:
    return pb.Token(id=token.id, logprob=token.logprob, top=[pb.Alternative(id=i, logprob=p) for i, p in token.top])
