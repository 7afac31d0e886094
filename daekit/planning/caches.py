"""The caches of a stage's teachers: their bytes on the disk, and what making them takes, before the student is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from daekit.errors import UserError
from daekit.planning.memory import ACTIVATIONS, CONTEXT, LIBRARIES, Memory, StageMemory
from daekit.planning.models import CachedTeacherModels
from daekit.planning.operations import forward_operations
from daekit.planning.trace import MicroBatch
from daekit.planning.training import DEFAULTS
from daekit.recipe.schema import CacheSpec, StageSpec
from daekit.recipe.validation import dotted

if TYPE_CHECKING:
    from datasets import Dataset

# tokenised rows of a stage: for training, and those that it is evaluated on
StageRows = Callable[[StageSpec], tuple["Dataset", "Dataset | None"]]
_FILE_COPIES = 3  # of what is written, in host memory: its tensors, their bytes, the file's content
_CHUNK_COPIES = {"top_k": 4, "sampled": 3}  # of the log-probabilities of a chunk, in float32; measured on the loop itself


@dataclass(frozen=True)
class RowCounts:
    """The different rows whose outputs a cache holds.

    Attributes:
        rows: Their number.
        tokens: All their tokens, which the teacher reads.
        loss_tokens: Those that carry loss, which take space.
        estimated: Why every row was taken to have ``max_length`` tokens, all with loss; empty where the rows were read.
    """

    rows: int
    tokens: int
    loss_tokens: int
    estimated: str = ""


@dataclass(frozen=True)
class CachePlan:
    """The cache of one teacher.

    Attributes:
        teacher: The key of the recipe, ``teachers.shop``.
        token_bytes: Bytes on the disk per loss token of the rows; of drawn tokens measured, or an estimate within ``drawn``.
        head_bytes: Bytes of the output heads, once.
        making: The memory of one device while it is made; of a served teacher without the server's.
        counts: Its rows; None where not even their number is known, for the reason in ``unread``.
        size: Bytes on the disk; None without counts.
        operations: Operations of making it, on all devices together; None without counts.
        drawn: Of drawn tokens that were not measured: the least and the most bytes per loss token. How many of the draws differ
            follows from how sure the teacher is, which only its forward pass tells.
        reported: Whether the report loads the teacher, to measure KL on rows that the cache does not hold.
    """

    teacher: str
    token_bytes: int
    head_bytes: int
    making: Memory
    unread: str
    counts: RowCounts | None
    size: int | None
    operations: float | None
    drawn: tuple[int, int] | None = None
    reported: bool = False


def cache_plans(memory: StageMemory, rows: StageRows | None, measured: Collection[str]) -> tuple[CachePlan, ...]:
    """The plans of the caches that a stage reads.

    Args:
        memory: The plan of the stage.
        rows: Reads its rows; None: they are not read.
        measured: Keys of the teachers that the report loads.
    """
    if not memory.models.cached:
        return ()
    read: tuple[Dataset, Dataset | None] | None = None
    reason = "the rows were not read"
    if rows is not None:
        try:
            read = _fitted(memory.stage, *rows(memory.stage))
        except UserError as error:
            reason = str(error).split("; ")[0]  # what follows is a remedy
    return tuple(_plan(memory, each, read, reason, dotted(each.key) in measured) for each in memory.models.cached)


def _fitted(stage: StageSpec, train: Dataset, validation: Dataset | None) -> tuple[Dataset, Dataset | None]:
    """The rows that stay under ``max_length`` and the policy for longer ones, of the data sets that are used."""
    from daekit.data.preparation import fit_to_length

    options = DEFAULTS | stage.trainer
    splits = options["packing"] and options["packing_strategy"] != "bfd"
    limit = None if splits else options["max_length"]
    teacher = None if stage.type == "sft" else stage.teacher_max_length
    train = fit_to_length(train, limit, stage.overlong, "train", teacher)[0]
    if validation is None or options.get("eval_strategy", "no") == "no":
        return train, None
    return train, fit_to_length(validation, limit, stage.overlong, "eval", teacher)[0]


def _plan(
    memory: StageMemory,
    cached: CachedTeacherModels,
    read: tuple[Dataset, Dataset | None] | None,
    reason: str,
    reported: bool,
) -> CachePlan:
    from daekit.teachers.cache.rows import KEY_BYTES
    from daekit.teachers.cache.values import CacheFormat

    spec = cached.cache
    form = CacheFormat(spec.keep, spec.k, spec.draws)
    batch, heads = _batch(memory), [tracer.meta.head for tracer in cached.members]
    widths = [each.shape[1] * tracer.cost(batch).hidden_width for each, tracer in zip(heads, cached.members, strict=True)]
    token_bytes, drawn = form.token_bytes(widths), None
    if spec.keep == "sampled":
        measured = _measured(spec)
        token_bytes = measured or token_bytes
        drawn = None if measured else (form.drawn_bytes(1), form.drawn_bytes(form.draws))
    head_bytes = sum(head.numel() * head.element_size() for head in heads) if spec.keep == "hidden" else 0
    rows, longest = memory.stage.data.rows, memory.training.teacher_length
    counts = None if rows is None else RowCounts(rows, rows * longest, rows * (longest - 1), reason)
    if read is not None:
        parts = [part for part in read if part is not None]
        domains = memory.stage.domains_of(cached.key, {str(domain) for part in parts for domain in part.unique("domain")})
        counts = _count(row for part in parts for row in part.with_format("numpy") if str(row["domain"]) in domains)
    size = operations = None
    if counts is not None:
        bounds = 16 if spec.keep == "sampled" else 8
        size = head_bytes + counts.loss_tokens * token_bytes + counts.rows * (KEY_BYTES + bounds)
        length = counts.tokens / max(counts.rows, 1)
        operations = sum(forward_operations(each.meta, counts.tokens, length) for each in cached.members)
        with_head = 0 if spec.keep == "hidden" else counts.loss_tokens
        operations -= 2 * (counts.tokens - with_head) * sum(head.numel() for head in heads)
    making = _making(memory, cached, batch, sum(widths), head_bytes, size)
    return CachePlan(dotted(cached.key), token_bytes, head_bytes, making, reason, counts, size, operations, drawn, reported)


def _measured(spec: CacheSpec) -> int | None:
    """Bytes per loss token of the drawn tokens that lie at the path of a cache already; None where there are none."""
    from daekit.teachers.cache.rows import KEY_BYTES
    from daekit.teachers.cache.store import CacheStore

    try:
        store = CacheStore(spec.path or "", mending=True)
    except UserError:
        return None
    if (store.facts.get("keep"), store.facts.get("draws")) != ("sampled", spec.draws) or not store.tokens:
        return None
    return round((store.size - len(store.index) * (KEY_BYTES + 16)) / store.tokens)


def _count(examples: Iterable[Mapping[str, Any]]) -> RowCounts:
    """Rows with loss, equal ones once."""
    from daekit.teachers.cache.rows import rows_of_examples

    different = {row.key: (len(row.input_ids), len(row.offsets)) for row in rows_of_examples(examples) if len(row.offsets)}
    return RowCounts(len(different), sum(size for size, _ in different.values()), sum(kept for _, kept in different.values()))


def _batch(memory: StageMemory) -> MicroBatch:
    """The largest batch that a cache's writer makes: its rows are padded, and as many as fit into its tokens run together."""
    from daekit.teachers.cache.asking import PAD_TO
    from daekit.teachers.cache.write import BATCH_TOKENS

    length = -(-memory.training.teacher_length // PAD_TO) * PAD_TO
    return replace(memory.batch, rows=max(1, BATCH_TOKENS // length), length=length, padded=True, accumulated=False)


def _making(
    memory: StageMemory, cached: CachedTeacherModels, batch: MicroBatch, width: int, head_bytes: int, size: int | None
) -> Memory:
    """The memory of making a cache: the teacher's weights, one batch, and what is kept of it; on a CPU the files, too.

    Args:
        width: Bytes of a token's last hidden states, of all members.
        head_bytes: Bytes of the output heads that are kept.
        size: Bytes of the cache, if they are known.
    """
    from daekit.teachers.cache.values import CHUNK_VALUES
    from daekit.teachers.cache.write import SHARD_BYTES

    tokens = batch.rows * batch.length
    metas = {id(tracer.meta): tracer.meta for tracer in cached.members}
    costs = [tracer.cost(batch) for tracer in cached.members]
    runs = max((cost.frozen for cost in costs), default=0)
    kept = 2 * tokens * width  # all hidden states, and those of the loss tokens
    if cached.cache.keep != "hidden" and costs:
        columns = max(tracer.meta.head.shape[0] for tracer in cached.members)
        chunk = batch.length if cached.cache.keep == "sampled" else min(tokens, max(1, CHUNK_VALUES // columns))
        kept += _CHUNK_COPIES[cached.cache.keep] * 4 * chunk * columns
    parts = Counter({"teacher weights": sum(meta.weight_bytes for meta in metas.values())})
    parts[CONTEXT if memory.machine.gpu else LIBRARIES] = memory.machine.overhead
    asked = parts | Counter({ACTIVATIONS: max(runs, kept)})
    if memory.machine.gpu:
        return Memory("the teacher is asked", dict(asked))
    shard = min(SHARD_BYTES, SHARD_BYTES if size is None else size - head_bytes)
    written = parts | Counter({"one file": _FILE_COPIES * max(shard, head_bytes)})
    asked["one file"] = shard
    phases = Memory("the teacher is asked", dict(asked)), Memory("a file is written", dict(written))
    return max(phases, key=lambda phase: phase.total)
