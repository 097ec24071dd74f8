"""The tables of what saving and loading costs."""

from __future__ import annotations

from benchmarks.estimate import Estimate
from benchmarks.result import Record, Table
from benchmarks.save_times import IN_MEMORY, LOAD, ON_DISK
from benchmarks.savers import DCP, GEMINI

_MEGA = 1e6
_HEADS = {ON_DISK: "save on disk, s", IN_MEMORY: "save in memory, s", LOAD: "load, s"}


def all_of(record: Record) -> list[Table]:
    """All tables of one number of ranks."""
    return [
        _times(record, "opt", "the OPT"),
        _times(record, "many", f"{2 * record['workload']['many']['units']} small parameters"),
        _checksums(record),
        _memory(record),
        _standstill(record),
        _goals(record),
    ]


def _times(record: Record, key: str, of: str) -> Table:
    times = record["times"][key]
    done = [what for what in _HEADS if what in times]
    by_name = {what: {one["name"]: one for one in times[what]} for what in done}
    names = list(dict.fromkeys(name for what in done for name in by_name[what]))
    cells = []
    for name in names:
        row = [name, f"{times['file_bytes'][name] / _MEGA:.1f}" if name in times["file_bytes"] else "-"]
        for what in done:
            one = by_name[what].get(name)
            row += ["-", "-"] if one is None else [f"{one['median_seconds']:.3f}", _format(one["ratio"])]
        cells.append(tuple(row))
    folders = ", ".join(f"{kind}: {system}" for kind, system in record["folders"].items() if system)
    rounds = {what: len(times[what][0]["seconds"]) for what in done}
    return Table(
        f"Saving and loading {of}, {record['ranks']} rank(s), {record['threads']} thread(s) each",
        f"Weights and AdamW's states in fp32, the same bytes for all. Medians of interleaved rounds ({_list(rounds)}); "
        f"ratios to `{DCP}` as medians of pairs with 95% bootstrap intervals. `gemini` is save_checkpoint and "
        "load_checkpoint, with all that belongs to resuming; `tensors alone` is what DCP does. DCP syncs its files by "
        "default, and so does everybody here but `torch.save` as it stands. On several ranks torch.save and "
        "safetensors write a file on each, which no other number of ranks could load. Loads are from the system's "
        f"cache, into weights that are there and states that are not. MB are those of the files. Folders: {folders}.",
        ("contender", "MB", *(head for what in done for head in (_HEADS[what], f"/ {DCP}"))),
        tuple(cells),
    )


def _checksums(record: Record) -> Table:
    found = record["checksums"]
    cells = []
    for what, share in found["shares"].items():
        measured = Estimate(**share["measured"]).format("{:.1%}")
        cells.append((what, measured, f"{share['computed']:.1%}"))
    return Table(
        f"What checksums cost, {record['ranks']} rank(s)",
        f"XXH3 takes {found['bytes_per_second'] / 1e9:.1f} GB/s on each rank, in blocks as they are read and written. "
        f"The share of the time of `{GEMINI}`: as the rounds without checksums say, and as that rate says.",
        ("what", "measured", "computed"),
        tuple(cells),
    )


def _memory(record: Record) -> Table:
    memory = record["memory"]
    chunk = memory["chunk_bytes"]

    def cell(nbytes: int | None) -> str:
        return "-" if nbytes is None else f"{nbytes / _MEGA:.1f}"

    def chunks(*nbytes: int | None) -> str:
        known = [one for one in nbytes if one is not None]
        return f"{max(known) / chunk:.2f}" if known else "-"

    cells = []
    for one in memory["contenders"]:
        for what in ("save", "load"):
            both = (one[what], one[f"{what}_resident"])
            cells.append((f"{one['name']}, {what}", *(cell(each) for each in both), chunks(*both), ""))
    for one in memory["background"]:
        name = f"{one['name']}, first save in the background"
        cells.append((name, "", cell(one["resident"]), chunks(one["resident"]), cell(one["snapshot"])))
    return Table(
        f"Most memory at a time beside what is there anyway, {record['ranks']} rank(s)",
        "MB on the rank that has the most: what torch's allocator gave out, and what was resident, with Python's own "
        "and mapped files. A load begins with weights and without states; what it leaves is not counted. The largest "
        f"chunk has {chunk / _MEGA:.1f} MB in fp32, as files have it. A save in the background keeps a copy, which is "
        "not counted either.",
        ("contender", "allocated", "resident", "chunks", "copy"),
        tuple(cells),
    )


def _standstill(record: Record) -> Table:
    found = record["standstill"]
    cells = [
        (one["name"], f"{1e3 * one['median_seconds']:.1f}", "1" if one["ratio"] is None else _format(one["ratio"]))
        for one in found["contenders"]
    ]
    return Table(
        f"How long a save in the background stops training, {record['ranks']} rank(s)",
        f"From the call to its return, for {found['bytes'] / _MEGA:.1f} MB on each rank; nothing else runs. `copy` is "
        "one copy of the same tensors into memory that was used before. A first save has to make its memory: a page "
        "that is touched for the first time costs more than its copy.",
        ("contender", "ms", "/ copy"),
        tuple(cells),
    )


def _goals(record: Record) -> Table:
    cells = [
        (one["goal"], one["predicted"], "-" if one["came"] is None else _format(one["came"]), one["verdict"])
        for one in record["goals"]
    ]
    return Table(
        f"Goals, {record['ranks']} rank(s)",
        "Judged by the median. What was predicted before the first whole run, and what came. Memory is in chunks, the "
        f"most of fp32 and split masters, allocated or resident. Times without checksums are compared with `{DCP}`: "
        "what may be added is what checksums cost.",
        ("goal", "predicted", "came", "verdict"),
        tuple(cells),
    )


def _format(found: Record | None) -> str:
    if found is None:
        return "1"
    value = Estimate(**found)
    return f"{value.median:.2f}" if value.low == value.high else value.format()


def _list(rounds: dict[str, int]) -> str:
    return ", ".join(f"{what}: {count}" for what, count in rounds.items())
