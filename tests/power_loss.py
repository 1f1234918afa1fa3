"""What a disk holds after a loss of power: whatever was synced, and of the rest some.

`recorded` runs a writer under strace and reads what it did to its files. `Disk` does the same again up to some moment,
and then writes what could be left of it: of what was written since a file's last fsync each piece is there, in part
there or not, and so is the removal of a file. That a file's own fsync also keeps its name is taken for granted, as it
is with ext4, XFS and Btrfs.

`python -m tests.power_loss DATABASE BATCHES` is the writer: it commits batches and says of each that it is committed.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from random import Random

ROOT = Path(__file__).parents[1]
ROWS = 20
_SECTOR = 512
_CALLS = "openat,close,lseek,read,write,pwrite64,writev,pwritev,fsync,fdatasync,ftruncate,rename,renameat,renameat2"
_CALLS += ",unlink,unlinkat,mmap,fallocate,copy_file_range,sendfile"


def write_batches(database: Path, batches: int) -> None:
    from tuneshift_dag.store import Store
    from tuneshift_dag.store.tables import CACHE, CACHED_RESPONSES

    store, dice = Store(database), Random(0)
    for batch in range(batches):
        rows = [
            {
                "key": f"{batch}-{row}", "text": dice.randbytes(4_000).hex(), "token_ids": [batch],
                "finish_reason": "stop", "sum_logprob": -1.0, "eos_logprob": -0.1, "added_at": datetime(2026, 1, 1),
            }
            for row in range(ROWS)
        ]  # fmt: skip
        store.append_all(CACHE, [(CACHED_RESPONSES, CACHED_RESPONSES.frame(rows))])
        print(f"committed {batch}", flush=True)


@dataclass(frozen=True)
class Event:
    """What was done to a file: ``write`` data at a place, ``cut`` to a size, ``sync``, ``remove``, or ``rename`` to
    another; or ``said``, a line on standard output."""

    kind: str
    path: str
    at: int = 0
    data: bytes = b""


def recorded(folder: Path, batches: int) -> list[Event]:
    """All that a writer of so many batches did in a new ``folder``."""
    folder.mkdir()
    trace = folder.with_suffix(".trace")
    words = ["strace", "-f", "-y", "-xx", "-s", "100000000", "-e", f"trace={_CALLS}", "-o", str(trace)]
    writer = [sys.executable, "-m", "tests.power_loss", str(folder / "test.duckdb"), str(batches)]
    subprocess.run([*words, *writer], cwd=ROOT, check=True, stdout=subprocess.PIPE)
    with trace.open() as lines:
        events = list(_events(lines, str(folder)))
    trace.unlink()
    return events


def _events(lines: Iterator[str], folder: str) -> Iterator[Event]:
    begun: dict[str, str] = {}
    at: dict[str, int] = {}  # place of each open file, by its number
    appended: set[str] = set()  # those whose place is always the end
    sizes: dict[str, int] = {}

    def changed(event: Event) -> Event:
        whole = 0 if event.kind == "cut" else sizes.get(event.path, 0)
        sizes[event.path] = max(whole, event.at + len(event.data))
        return event

    for line in lines:
        pid, _, call = line.rstrip("\n").partition(" ")
        call = call.lstrip()
        if call.endswith("<unfinished ...>"):
            begun[pid] = call.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", call):
            call = begun.pop(pid) + resumed[1]
        found = re.match(r"(\w+)\((.*)\)\s+= (-?\d+)(?:<.*>)?", call)
        if not found or int(found[3]) < 0:
            continue
        name, arguments, result = found[1], found[2], int(found[3])
        opened = re.match(r"(\d+)<([^>]*)>", arguments)
        number, path = (opened[1], _text(opened[2])) if opened else ("", "")
        if name == "openat":
            path = _text(call.rpartition("<")[2].rstrip(">"))
            at[str(result)] = 0
            (appended.add if "O_APPEND" in arguments else appended.discard)(str(result))
            if path.startswith(folder) and "O_TRUNC" in arguments:
                yield changed(Event("cut", path))
        elif name == "lseek":
            at[number] = result
        elif name == "read":
            at[number] = at.get(number, 0) + result
        elif name == "write" and number == "1" and not path.startswith(folder):
            yield Event("said", "", data=_data(arguments)[:result])
        elif name in ("rename", "renameat", "renameat2"):
            one, other = (_text(text) for text in re.findall(r'"([^"]*)"', arguments))
            if one.startswith(folder):
                sizes[other] = sizes.pop(one, 0)
                yield Event("rename", one, data=other.encode())
        elif name in ("unlink", "unlinkat"):
            path = _text(re.findall(r'"([^"]*)"', arguments)[0])
            if path.startswith(folder):
                sizes.pop(path, None)
                yield Event("remove", path)
        elif path.startswith(folder):
            if name == "write":
                place = sizes.get(path, 0) if number in appended else at.get(number, 0)
                yield changed(Event("write", path, place, _data(arguments)[:result]))
                at[number] = place + result
            elif name == "pwrite64":
                yield changed(Event("write", path, int(arguments.rpartition(", ")[2]), _data(arguments)[:result]))
            elif name in ("fsync", "fdatasync"):
                yield Event("sync", path)
            elif name == "ftruncate":
                yield changed(Event("cut", path, int(arguments.rpartition(", ")[2])))
            else:
                assert name == "close", f"{name} isn't followed"


def _data(arguments: str) -> bytes:
    return bytes.fromhex(arguments[arguments.index('"') + 1 : arguments.rindex('"')].replace("\\x", ""))


def _text(written: str) -> str:
    """A path, which strace -xx writes in hexadecimal numbers too."""
    return bytes.fromhex(written.replace("\\x", "")).decode() if written.startswith("\\x") else written


@dataclass
class Disk:
    """Files as they are on the disk, and what else was done to them that needn't be there."""

    synced: dict[str, bytearray] = field(default_factory=dict)
    pending: dict[str, list[Event]] = field(default_factory=dict)
    removed: dict[str, bytearray] = field(default_factory=dict)
    """What was removed since anything was synced: it may still be there."""
    said: list[str] = field(default_factory=list)

    def do(self, event: Event, syncs: bool = True) -> None:
        """Without ``syncs`` nothing is ever safe."""
        if event.kind == "said":
            self.said += event.data.decode().split("\n")[:-1]
        elif event.kind in ("write", "cut"):
            self.pending.setdefault(event.path, []).append(event)
        elif event.kind == "sync":
            if syncs and event.path in self.pending:
                content = self.synced.setdefault(event.path, bytearray())
                for change in self.pending.pop(event.path):
                    _apply(content, change.at, change.data, change.kind == "cut")
                self.removed.clear()
        elif event.kind == "remove":
            self.pending.pop(event.path, None)
            if event.path in self.synced:
                self.removed[event.path] = self.synced.pop(event.path)
        else:  # a file that takes the place of another: at once, with all that was written to it or without
            other = event.data.decode()
            for files in (self.synced, self.pending):
                if event.path in files:
                    files[other] = files.pop(event.path)  # type: ignore[index]

    def left(self, dice: Random) -> dict[str, bytes]:
        """Files after a loss of power."""
        there = {path: bytearray(content) for path, content in self.synced.items()}
        back = {path: bytearray(content) for path, content in self.removed.items() if dice.random() < 0.5}
        share = dice.choice([0.0, 0.5, 1.0])
        for path, changes in self.pending.items():
            # What is written to a new file of a removed one's name never gets into that one.
            for change in changes if path not in back else ():
                if change.kind == "cut" and dice.random() < share:
                    _apply(there.setdefault(path, bytearray()), change.at, b"", True)
                for start in range(0, len(change.data), _SECTOR):
                    if dice.random() < share:
                        sector = change.data[start : start + _SECTOR]
                        _apply(there.setdefault(path, bytearray()), change.at + start, sector, False)
        return {path: bytes(content) for path, content in (there | back).items()}


def _apply(content: bytearray, at: int, data: bytes, is_cut: bool) -> None:
    if is_cut:
        del content[at:]
    content.extend(bytes(max(0, at + len(data) - len(content))))
    content[at : at + len(data)] = data


def lost(events: list[Event], case: int, folder: Path, syncs: bool = True) -> str:
    """What is wrong with the store after a loss of power at the moment ``case`` draws, and after the repair that its
    message names, if it does; empty for nothing. ``folder`` is that of the events' files."""
    from tuneshift_dag import TuneshiftError

    dice, disk = Random(case), Disk()
    for event in events[: dice.randrange(len(events) + 1)]:
        disk.do(event, syncs)
    after = folder.with_name(f"after-{case}")
    for path, content in disk.left(dice).items():
        file = after / Path(path).relative_to(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    try:
        found = _batches(after / "test.duckdb")
    except TuneshiftError as error:
        repair = re.search(r"truncate -s \d+ '.*'$", str(error))
        if not repair:  # a file whose very beginning isn't there yet
            return f"after {len(disk.said)} batches: {error}" if disk.said else ""
        subprocess.run(repair[0], shell=True, check=True)
        found = _batches(after / "test.duckdb")
    missing = [batch for batch in range(len(disk.said)) if found.get(batch) != (ROWS, 8_000)]
    halves = [batch for batch, rows in found.items() if rows != (ROWS, 8_000)]
    return (
        f"of {len(disk.said)} committed batches {missing} are gone; in part there: {halves}"
        if missing or halves
        else ""
    )


def _batches(database: Path) -> dict[int, tuple[int, int]]:
    """Rows, and the length of the shortest text, by batch."""
    from tuneshift_dag.store import Store

    query = "SELECT token_ids[1], count(*), min(length(text)) FROM cache.responses GROUP BY 1"
    return {batch: (rows, shortest) for batch, rows, shortest in Store(database).read(query).iter_rows()}


if __name__ == "__main__":
    write_batches(Path(sys.argv[1]), int(sys.argv[2]))
