"""Which parameters are in the buffers of which rank: pipeline stages and expert-parallel ranks, found by the sizes of buffers.

Pipeline stages, and the model chunks of an interleaved schedule, hold consecutive layers, as many as fill their buffers exactly.
So no setting is needed to say how layers are divided.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from formats.errors import UserError
from formats.optimizer.layout import Parameter as Sized
from formats.optimizer.layout import Slot, assign_slots, bounds
from formats.optimizer.parameters import EMBEDDING, OUTPUT, Parameter

_RESAVE = "load it in Megatron with the settings of the run and save it with `--dist-ckpt-optim-fully-reshardable`"


class Buffer(Protocol):
    """The flat state of one model chunk of a rank."""

    @property
    def label(self) -> str: ...

    @property
    def size(self) -> int:
        """Its number of elements, without padding at the end of buckets."""
        ...

    def bucketings(self, parameters: Sequence[Sized], /) -> Iterator[Sequence[int]]:
        """Yield the sizes that its buckets may have."""
        ...

    def check(self, slots: Mapping[str, Slot], parameters: Sequence[Sized], /) -> None:
        """Raise UserError where the file contradicts that the parameters are there."""
        ...

    def run(self, slot: Slot) -> tuple[str, int]:
        """Return what the state of a parameter is stored in, and the number of its first element there."""
        ...


@dataclass(frozen=True, slots=True)
class Optimizer:
    """One optimizer of a model: the dense parameters' or the experts'. `buffers` are by group, then one for each model chunk."""

    ranks: int
    """How many tensor-parallel ranks divide its weights."""

    buffers: Mapping[int, Sequence[Buffer]]

    @property
    def groups(self) -> int:
        return 1 + max(self.buffers)


@dataclass(slots=True)
class StateLocation:
    """The slot of a weight's state in the buffer of a rank."""

    parameter: Parameter
    rank: int
    buffer: Buffer
    slot: Slot


@dataclass(slots=True)
class Chunk:
    """What a model chunk holds, in the order of registration. `copies` are the weights tied to the first stage's embedding, those
    before and those after the others."""

    blocks: list[list[Parameter]]
    copies: tuple[list[Parameter], list[Parameter]] = field(default_factory=lambda: ([], []))

    @property
    def parameters(self) -> list[Parameter]:
        return [*self.copies[0], *(parameter for block in self.blocks for parameter in block), *self.copies[1]]


def divide(optimizer: Optimizer, blocks: Sequence[list[Parameter]]) -> dict[tuple[int, int], Chunk]:
    """Return what the model chunks of pipeline stages hold, by chunk and stage. Raises UserError where sizes do not come out."""
    stages = _stages(optimizer)
    chunks = dict[tuple[int, int], Chunk]()
    counts = {len(buffers) for buffers in optimizer.buffers.values()}
    if len(counts) > 1:
        raise UserError(f"ranks have between {min(counts)} and {max(counts)} buffers of optimizer state", hint=_RESAVE)
    chunks_and_stages = [(chunk, stage) for chunk in range(counts.pop()) for stage in range(stages)]
    rest = list(blocks)
    for number, (chunk, stage) in enumerate(chunks_and_stages):
        buffer = optimizer.buffers[stage * optimizer.ranks][chunk]
        is_last = number == len(chunks_and_stages) - 1
        candidates = _last(rest, blocks, tied=stages > 1) if is_last else _first_blocks(rest)
        chunks[chunk, stage] = _fitting(buffer, candidates)
        rest = rest[len(chunks[chunk, stage].blocks) :]
    return chunks


def _stages(optimizer: Optimizer) -> int:
    missing = [group for group in range(optimizer.groups) if group not in optimizer.buffers]
    if missing or optimizer.groups % optimizer.ranks:
        raise UserError(
            f"{len(optimizer.buffers)} groups of ranks have optimizer state, which are not the stages of {optimizer.ranks}"
            + (f": group {missing[0]} is missing" if missing else ""),
            hint="the checkpoint is incomplete: copy it again",
        )
    return optimizer.groups // optimizer.ranks


def _first_blocks(blocks: Sequence[list[Parameter]]) -> Iterator[Chunk]:
    return (Chunk(list(blocks[:count])) for count in range(len(blocks) + 1))


def _last(rest: Sequence[list[Parameter]], blocks: Sequence[list[Parameter]], *, tied: bool) -> Iterator[Chunk]:
    """Yield what the last chunk may hold: all that is left, and copies of the embedding for output and for prediction layers."""
    yield Chunk(list(rest))
    embedding = [parameter for parameter in blocks[0] if parameter.name == EMBEDDING] if tied else []
    if embedding:
        output = [replace(embedding[0], name=OUTPUT)]
        yield Chunk(list(rest), ([], output))
        yield Chunk(list(rest), (embedding, []))
        yield Chunk(list(rest), (embedding, output))


def _fitting(buffer: Buffer, candidates: Iterator[Chunk]) -> Chunk:
    """Return the first candidate that fills a buffer exactly."""
    nearest: UserError | None = None
    for chunk in candidates:
        sized = _sized(chunk.parameters, 0)
        fewest, most = bounds(size for _, size in sized)
        if not fewest <= buffer.size <= most:
            continue
        try:
            _slots(buffer, chunk, 0)
        except UserError as error:
            nearest = error
            continue
        return chunk
    reason = nearest.args[0] if nearest else "no number of layers has as many"
    raise UserError(
        f"the parameters of the model do not fill the {buffer.size} elements of `{buffer.label}`: {reason}",
        hint=f"a layer's order or a frozen weight may be the reason; {_RESAVE}",
    )


def locate(optimizer: Optimizer, chunks: Mapping[tuple[int, int], Chunk]) -> Iterator[StateLocation]:
    """Yield where every weight is on every rank; of copies tied to the embedding the first stage's alone."""
    for group, buffers in optimizer.buffers.items():
        stage, rank = divmod(group, optimizer.ranks)
        for chunk, buffer in enumerate(buffers):
            yield from _located(buffer, chunks[chunk, stage], rank)


def locate_experts(
    optimizer: Optimizer, chunks: Mapping[tuple[int, int], Chunk], experts: Sequence[Parameter], stages: int
) -> Iterator[StateLocation]:
    """Yield where the experts are whose optimizer is their own. `chunks` are those of the dense parameters."""
    count = 1 + max(parameter.expert for parameter in experts)
    groups = optimizer.groups
    parallel = groups // (optimizer.ranks * stages)
    if parallel < 1 or groups != optimizer.ranks * stages * parallel or count % parallel:
        raise UserError(
            f"{count} experts cannot be divided evenly among {groups} groups of ranks in {stages} pipeline stages", hint=_RESAVE
        )
    of_layer: dict[tuple[str, int], list[Parameter]] = {}
    for parameter in experts:
        of_layer.setdefault((parameter.stack, parameter.layer), []).append(parameter)
    for group in range(groups):
        rest, rank = divmod(group, optimizer.ranks)
        stage, number = divmod(rest, parallel)
        local = range(number * count // parallel, (number + 1) * count // parallel)
        held = [_experts(chunk, of_layer, local) for (_, at), chunk in sorted(chunks.items()) if at == stage]
        held = [chunk for chunk in held if any(chunk.blocks)]
        buffers = optimizer.buffers.get(group, ())
        if len(held) != len(buffers):
            raise UserError(
                f"group {group} of the experts' optimizer has {len(buffers)} buffers, and {len(held)} model chunks have experts",
                hint="the checkpoint is incomplete: copy it again",
            )
        for chunk, buffer in zip(held, buffers, strict=True):
            yield from _located(buffer, chunk, rank)


def _experts(chunk: Chunk, of_layer: Mapping[tuple[str, int], list[Parameter]], local: range) -> Chunk:
    layers = dict.fromkeys((parameter.stack, parameter.layer) for block in chunk.blocks for parameter in block)
    return Chunk([[weight for weight in of_layer.get(layer, ()) if weight.expert in local] for layer in layers])


def _located(buffer: Buffer, chunk: Chunk, rank: int) -> Iterator[StateLocation]:
    try:
        slots = _slots(buffer, chunk, rank)
    except UserError as error:
        raise UserError(f"`{buffer.label}`: {error.args[0]}", hint=_RESAVE) from None
    for block in chunk.blocks:
        for parameter in block:
            yield StateLocation(parameter, rank, buffer, slots[_label(parameter)])


def _slots(buffer: Buffer, chunk: Chunk, rank: int) -> dict[str, Slot]:
    """Return where the parameters of a chunk are, in the first way of buckets in which they fill the buffer."""
    sized = _sized(chunk.parameters, rank)
    refusal: UserError | None = None
    for buckets in buffer.bucketings(sized):
        try:
            slots = assign_slots(sized, buckets)
            buffer.check(slots, sized)
        except UserError as error:
            refusal = refusal or error
            continue
        return slots
    raise refusal or UserError(f"the parameters have {sum(size for _, size in sized)} elements, the buffer {buffer.size}")


def _sized(parameters: Sequence[Parameter], rank: int) -> list[Sized]:
    return [Sized(_label(parameter), parameter.size(rank)) for parameter in parameters]


def _label(parameter: Parameter) -> str:
    """Return a name that is a parameter's alone in a model chunk."""
    layer = f"{parameter.stack}.{parameter.layer}." if parameter.stack else ""
    expert = f" of expert {parameter.expert}" if parameter.expert >= 0 else ""
    return f"{layer}{parameter.name}{expert}"
