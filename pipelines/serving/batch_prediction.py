"""Predictions of large inputs with Ray Data: blocks flow through workers that hold the model.

A block is a range of lines of a ``.jsonl`` file, or a group of media files. The same input gives
the same blocks, so a prediction that was interrupted continues with the blocks that are missing.

    plan: blocks ──> workers: read, predict, write a part ──> driver: counts

    <output>/plan.json                    what the parts belong to; written first
    <output>/part-000000.jsonl            predictions of a block, one per line
    <output>/part-000000.rejected.jsonl   its unusable rows with their reasons
    <output>/done/part-000000.json        counts and hashes; written last, commits the block
    <output>/summary.json                 counts of all blocks; written when all are done

Input and output are folders or URIs. Only the rows of a few blocks are in memory. Blocks that have
a file in ``done`` are not predicted again, if their bytes are still those that were predicted.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.io.directory import OversizedInputError, SourceDirectory, iter_lines
from pipelines.data.io.source_file import format_json_line, open_stream
from pipelines.serving.inputs import (
    InputRow,
    PredictionItem,
    find_table_format,
    has_rows,
    parse_input_line,
    read_file_bytes,
)
from skillnet_platform import cluster, console
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError
from skillnet_platform.storage.location import (
    Location,
    join_location,
    list_location,
    parse_location,
    read_if_exists,
    write_location,
)
from skillnet_platform.storage.retry import StoreUnavailableError

if TYPE_CHECKING:
    from pipelines.serving.predictor import AnswerLayout, TaskPredictor

PLAN, SUMMARY, DONE = "plan.json", "summary.json", "done"
#: Levels of folders below an input.
MAX_DEPTH = 100


@dataclass(frozen=True)
class PredictionBlock:
    """Rows that one worker predicts and commits together.

    Args:
        index: position of the block, from 0.
        source: path or URI of the ``.jsonl`` file; "" for media files.
        start: offset of the first line, in bytes; the line may be empty.
        line: number of this line, from 1.
        rows: number of rows.
        files: paths or URIs of media files.
    """

    index: int
    source: str = ""
    start: int = 0
    line: int = 1
    rows: int = 0
    files: Sequence[str] = ()


@dataclass(frozen=True)
class BlockPlan:
    """All blocks of an input.

    Args:
        blocks: in the order of the input.
        digest: SHA-256 of names, sizes and blocks of the input; the bytes of a block are hashed
            when it is predicted.
    """

    blocks: list[PredictionBlock]
    digest: str


@dataclass(frozen=True)
class BatchRequest:
    """What the workers of a batch prediction need; plain values.

    Args:
        model: address of the model.
        data: prepared corpora, for a checkpoint; None takes those of its run.
        output: folder or URI of the parts.
        task: task to run; None selects one by modality.
        top: number of alternatives; None leaves them out.
        precision: auto, bf16, fp32 or fp64.
        tracking_uri: address of the tracker.
        digest: SHA-256 of the model that the workers must load; "" accepts any.
        has_embeddings: whether predictions with an answer have an embedding, too.
    """

    model: str
    data: str | None
    output: str
    task: str | None = None
    top: int | None = None
    precision: str = "auto"
    tracking_uri: str | None = None
    digest: str = ""
    has_embeddings: bool = False

    @property
    def layout(self) -> "AnswerLayout":
        """Fields of a prediction in the output."""
        from pipelines.serving.predictor import AnswerLayout

        return AnswerLayout(self.top or 0, self.has_embeddings)

    def list_settings(self, digest: str, block_rows: int) -> dict[str, Any]:
        """Return what the bytes of the parts depend on, beside the input.

        Args:
            digest: SHA-256 of the model.
            block_rows: rows of a part at most.
        """
        return {
            "model": digest,
            "task": self.task,
            "top": self.top,
            "embeddings": self.has_embeddings,
            "precision": self.precision,
            "block_rows": block_rows,
        }


@dataclass(frozen=True)
class BatchSummary:
    """Result of a batch prediction.

    Args:
        output: folder or URI of the parts.
        blocks: number of blocks.
        resumed: blocks that were done before.
        predictions: number of predictions.
        rejected: number of unusable rows.
    """

    output: str
    blocks: int
    resumed: int
    predictions: int
    rejected: int


class BlockPredictor:
    """Worker of Ray Data: predicts blocks and commits each as a part of the output.

    Args:
        request: files, task and limits of the prediction.
        predictor: with the model; None loads it.
    """

    def __init__(self, request: BatchRequest, predictor: "TaskPredictor | None" = None) -> None:
        self._request, self._output = request, parse_location(request.output, Path())
        if predictor is None:
            predictor, digest = open_request_predictor(request)
            # An alias of the registry can move between two workers.
            if request.digest not in ("", digest):
                raise UserError(f"{request.model}: is another model now. Name a version")
        self._predictor = predictor

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Predict the blocks of a batch of Ray Data; return their counts as JSON."""
        blocks = [PredictionBlock(**json.loads(text)) for text in batch["block"]]
        return {"counts": [json.dumps(self.commit_block(block)) for block in blocks]}

    def commit_block(self, block: PredictionBlock) -> dict[str, Any]:
        """Predict a block, write its part, and return its counts.

        Args:
            block: to predict.
        """
        lines: list[bytes] = []
        rejected: list[bytes] = []
        seen = hashlib.sha256()
        rows = _read_rows(block, self._request.task, seen)
        layout = self._request.layout
        for part in self._predictor.answer_rows(rows, self._request.top or 1):
            lines += [format_json_line(each).encode() for each in part.list_documents(layout)]
            rejected += [format_json_line(each).encode() for each in part.list_reasons()]
        name, data = f"part-{block.index:06d}", b"".join(lines)
        write_location(join_location(self._output, f"{name}.jsonl"), data)
        if rejected:
            other = join_location(self._output, f"{name}.rejected.jsonl")
            write_location(other, b"".join(rejected))
        counts = {
            "part": name,
            "rows": block.rows,
            "predictions": len(lines),
            "rejected": len(rejected),
            "input_sha256": seen.hexdigest(),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        # Last: it commits the part.
        done = join_location(self._output, DONE, f"{name}.json")
        write_location(done, json.dumps(counts).encode())
        return counts


def predict_blocks(request: BatchRequest, where: Location, block_rows: int) -> BatchSummary:
    """Predict a large input in blocks; a call with the same arguments continues an earlier one.

    Args:
        request: files, task and limits of the prediction.
        where: input, see :func:`plan_blocks`.
        block_rows: rows of a block at most.

    Raises:
        UserError: the model or the input is missing, or the output holds other predictions.
        StoreUnavailableError: the store does not respond; the same command continues.
    """
    output = parse_location(request.output, Path())
    plan = plan_blocks(where, block_rows)
    # A wrong model fails before Ray starts, and the workers find its bundle in the cache.
    predictor, digest = open_request_predictor(request)
    request = replace(request, digest=digest)
    settings = request.list_settings(digest, block_rows)
    settings |= {"blocks": len(plan.blocks), "input": plan.digest}
    claim_parts(output, settings, lambda: bool(_read_done(output, plan)))
    counts = _read_done(output, plan)
    missing = [block for block in plan.blocks if block.index not in counts]
    resumed = len(counts)
    if resumed:
        console.print_note(
            f"{resumed} of {len(plan.blocks)} blocks are done; their input is compared, and the "
            "others follow"
        )
        _check_done_input(output, plan, counts)
    rows = sum(block.rows for block in plan.blocks)
    done = sum(each["rows"] for each in counts.values())
    with console.show_progress("predicting", rows, "rows", done) as bar:
        # A single block is faster without Ray, which takes seconds to start.
        run = _run_here(request, predictor, missing) if len(missing) < 2 else _run(request, missing)
        for each in run:
            counts[int(each["part"].rpartition("-")[2])] = each
            bar.advance(each["rows"])
    total = {key: sum(each[key] for each in counts.values()) for key in ("predictions", "rejected")}
    parts = [counts[index] for index in sorted(counts)]
    document = {**total, "parts": parts}
    write_location(join_location(output, SUMMARY), json.dumps(document, indent=2).encode())
    return BatchSummary(str(request.output), len(plan.blocks), resumed, **total)


def open_request_predictor(request: BatchRequest) -> "tuple[TaskPredictor, str]":
    """Return the predictor of a request, and the digest of all that its answers depend on.

    Args:
        request: files, task and limits of the prediction.

    Raises:
        UserError: the model is missing or damaged.
    """
    from pipelines.training.runs.model_source import resolve_model

    source = resolve_model(request.model, request.tracking_uri)
    # torch loads here: a wrong input or model is reported without it.
    from pipelines.serving.bundle import open_predictor

    predictor = open_predictor(
        source, source.find_corpora(request.data), request.precision, request.task
    )
    # The corpora of a checkpoint determine its names, captions and preprocessing.
    tasks = {task: predictor.describe_task(task) for task in predictor.tasks}
    return predictor, digest_config([source.digest, tasks, predictor.tokenizer.to_str()])


def _run_here(
    request: BatchRequest, predictor: "TaskPredictor", blocks: list[PredictionBlock]
) -> Iterator[dict[str, Any]]:
    worker = BlockPredictor(request, predictor)
    for block in blocks:
        yield worker.commit_block(block)


def _run(request: BatchRequest, blocks: list[PredictionBlock]) -> Iterator[dict[str, Any]]:
    """Predict blocks with Ray Data, and yield the counts of each block when it is committed."""
    with cluster.ray_session() as ray:
        import ray.data
        from ray.exceptions import RayTaskError

        workers = max(1, min(int(ray.available_resources().get("CPU", 1)), len(blocks)))
        texts = [{"block": json.dumps(asdict(block))} for block in blocks]
        predicted = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
            BlockPredictor,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=workers),
            fn_constructor_args=(request,),
            num_cpus=1,
        )
        try:
            for row in predicted.iter_rows():
                yield json.loads(row["counts"])
        except RayTaskError as error:
            if isinstance(error.cause, UserError | StoreUnavailableError):
                raise error.cause from None
            raise


def _read_rows(
    block: PredictionBlock, task: str | None, seen: "hashlib._Hash"
) -> Iterator[InputRow]:
    """Yield the rows of a block; ``seen`` hashes their bytes, also of files that they name."""

    def see(data: bytes) -> bytes:
        # With its length, so that bytes do not move between two files unnoticed.
        seen.update(len(data).to_bytes(8, "big"))
        seen.update(data)
        return data

    for name in block.files:
        item, reason = None, "the file is empty"
        try:
            if data := see(read_file_bytes(name)):
                item, reason = PredictionItem(name, None, data, task), ""
        except UserError as error:
            reason = str(error).removeprefix(f"{name}: ")
        yield InputRow(name, {"source": name}, item, reason)
    if not block.source:
        return
    folder: Location = (
        block.source.rpartition("/")[0] if "://" in block.source else Path(block.source).parent
    )

    def read_file(name: str) -> bytes:
        return see(read_file_bytes(str(join_location(folder, name))))

    with open_stream(block.source) as stream:
        stream.seek(block.start)
        lines = itertools.islice(iter_lines(stream), block.rows)
        for number, line in lines:
            line_number = block.line - 1 + number
            yield parse_input_line(block.source, line_number, see(line), read_file, task)


def claim_parts(output: Location, settings: dict[str, Any], has_parts: Callable[[], bool]) -> None:
    """Write the plan into a folder of parts, or check that an earlier call had the same plan.

    Args:
        output: folder or URI of the parts.
        settings: what their bytes depend on.
        has_parts: returns whether the folder holds parts.

    Raises:
        UserError: the folder holds parts of another call.
    """
    where = join_location(output, PLAN)
    found = read_if_exists(where)
    if found is None:
        if has_parts():
            raise UserError(f"{output}: holds parts without {PLAN}. Choose another --output")
        write_location(where, json.dumps(settings, indent=2).encode())
        return
    try:
        earlier = json.loads(found)
        changed = [key for key, value in settings.items() if earlier.get(key) != value]
    except (ValueError, AttributeError):
        raise UserError(f"{where}: is damaged. Choose another --output") from None
    if changed:
        raise UserError(
            f"{output}: holds predictions of another call ({', '.join(changed)} differs). Choose "
            "another --output, or remove it"
        )


def _check_done_input(output: Location, plan: BlockPlan, counts: dict[int, dict[str, Any]]) -> None:
    """Raise UserError if the input of a committed block has other bytes than it had then."""
    for index, committed in sorted(counts.items()):
        block, seen = plan.blocks[index], hashlib.sha256()
        for _ in _read_rows(block, None, seen):
            pass
        if seen.hexdigest() != committed["input_sha256"]:
            raise UserError(
                f"{output}: {committed['part']} was predicted from other bytes than the rows of "
                f"{block.source or block.files[0]} have now. Choose another --output"
            )


def _read_done(output: Location, plan: BlockPlan) -> dict[int, dict[str, Any]]:
    """Return index -> counts of the committed blocks of an output."""
    folder = join_location(output, DONE)
    names = [name for name in list_location(folder) if name.startswith("part-")]
    counts = {}
    for name in names:
        data = read_if_exists(join_location(folder, name))
        try:
            found = json.loads(data or b"")
            index = int(found["part"].rpartition("-")[2])
            usable = {key: int(found[key]) for key in ("rows", "predictions", "rejected")}
            _ = found["input_sha256"]
        # A disk that was full may leave a damaged record; its block is predicted again.
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if 0 <= index < len(plan.blocks) and usable["rows"] == plan.blocks[index].rows:
            counts[index] = found
    return counts


def plan_blocks(where: Location, block_rows: int) -> BlockPlan:
    """Return the blocks of a file or folder; ``.jsonl`` files are read once to find their lines.

    Args:
        where: a ``.jsonl`` file, or a folder of ``.jsonl`` or media files.
        block_rows: rows of a block at most.

    Raises:
        UserError: there is no file, or a file cannot be read.
    """
    listed = _list_input(where)
    names = [name for name, _ in listed]
    other = next((name for name in names if find_table_format(name) and not has_rows(name)), None)
    if other is not None:
        raise UserError(
            f"{other}: only .jsonl files are cut into blocks for a folder of answers. Name one "
            "file of answers for the whole input, such as --output answers.csv"
        )
    blocks = [each for name in names if has_rows(name) for each in _cut_lines(name, block_rows)]
    media = [name for name in names if not has_rows(name)]
    for first in range(0, len(media), block_rows):
        group = tuple(media[first : first + block_rows])
        blocks.append(PredictionBlock(0, rows=len(group), files=group))
    if not blocks:
        raise UserError(f"{where}: no rows")
    numbered = [replace(each, index=index) for index, each in enumerate(blocks)]
    return BlockPlan(numbered, digest_config([listed, [(b.start, b.rows) for b in numbered]]))


def _list_input(where: Location) -> list[tuple[str, int]]:
    """Return paths or URIs with sizes, sorted; hidden files are left out."""
    source = SourceDirectory(str(where))
    if source.is_file:
        with open_stream(source.uri) as stream:
            return [(str(where), stream.seek(0, 2))]
    entries = (each for each in source.walk(depth=MAX_DEPTH) if "/_" not in f"/{each.name}")
    if not (found := [(str(join_location(where, each.name)), each.size or 0) for each in entries]):
        raise UserError(f"{where}: no files")
    return sorted(found)


def _cut_lines(name: str, block_rows: int) -> Iterator[PredictionBlock]:
    """Yield the blocks of a ``.jsonl`` file."""
    try:
        with open_stream(name) as stream:
            start, first, rows = 0, 1, 0
            for number, _ in iter_lines(stream):
                rows += 1
                if rows == block_rows:
                    yield PredictionBlock(0, name, start, first, rows)
                    # The stream is buffered, and its position is that of the next line.
                    start, first, rows = stream.tell(), number + 1, 0
            if rows:
                yield PredictionBlock(0, name, start, first, rows)
    except OversizedInputError as error:
        raise UserError(f"{name}: {error}. Give a file of JSON lines") from None
