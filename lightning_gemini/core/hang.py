"""Ranks that wait for each other in vain: what each of them tells the others, writes down and raises."""

from __future__ import annotations

import os
import re
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from lightning_gemini.core.errors import PeerError
from lightning_gemini.core.peers import Board
from lightning_gemini.core.pulse import Pulse

_TIMED_OUT = re.compile(r"time[d]?[ -]?out", re.IGNORECASE)  # gloo's and NCCL's own words
_BROKEN = re.compile(r"clos|connect|reset by peer|broken pipe|abort", re.IGNORECASE)
_PREFIX = "timed out: "

#: Ranks that a message lists; the file has all of them.
_LISTED_RANKS = 8

_LOOKS, _SHORTEST, _LONGEST = 40, 0.05, 10.0  # looks in one timeout; seconds between two
_LOOKS_TO_ANSWER = 3  # of a watchdog, after it was called

#: How long whoever raises waits for the watchdog that is writing the same file.
_WRITING_SECONDS = 5.0


class Hang:
    """One rank's part in a hang.

    Args:
        pulse: what this rank is doing.
        board: reaches the other ranks without a collective.
        timeout: seconds after which a wait for other ranks fails.
        folder: where the file goes; made when there is something to write.
        name: the rank's number in the file's name.

    Attributes:
        rank: this one.
        timeout: as given.
        period: seconds between two looks of a watchdog.
        broken: why nothing can be exchanged any more, if that is so.
    """

    def __init__(self, pulse: Pulse, board: Board, timeout: float, folder: Path, name: int) -> None:
        self.rank = board.rank
        self.timeout = timeout
        self.period = min(max(timeout / _LOOKS, _SHORTEST), _LONGEST)
        self.broken: str | None = None
        self._pulse = pulse
        self._board = board
        self._folder = folder.absolute()
        self._name = f"gemini_hang-rank{name}.txt"
        self._written: tuple[int, Path, str] | None = None  # at which beat, where, and what
        self._writing = threading.Lock()
        self._alarms = 0
        self._answered: str | None = None

    def alarm(self, seconds: float) -> str:
        """This rank has made no progress for ``seconds``: calls the others and writes the file; says so."""
        self._alarms += 1
        path = self._write(f"no progress for {seconds:.1f} s")
        self._board.call(self._alarms)
        self._board.tell(self._now())
        return (
            f"rank {self.rank} has made no progress for {seconds:.1f} s; a wait for other ranks ends with an "
            f"error after {self.timeout:g} s. {_pointer(path)}"
        )

    def called(self) -> int | None:
        """The rank that makes no progress and has called since this was last asked, if there is one."""
        call = self._board.called()
        if call is None or call == self._answered:
            return None
        self._answered = call
        caller = int(call.split()[0])
        return caller if caller != self.rank else None

    def answer(self, caller: int) -> None:
        """Another rank makes no progress, perhaps because it waits for this one: says where this one is."""
        self._board.tell(self._now())
        self._write(f"rank {caller} makes no progress, and has asked where this rank is", again=True)

    def explain(self, error: RuntimeError, what: str, seconds: float) -> str:
        """Why a wait for other ranks failed, in words.

        The file is written, if it is not there yet, where the ranks have hung. Where a rank failed by itself its own
        traceback says why, and where its connection broke without a word this rank's state has nothing to do with it.

        Args:
            error: what the wait raised.
            what: what was waited for.
            seconds: for how long.
        """
        timed_out = _TIMED_OUT.search(str(error)) is not None
        words = self._board.read() if timed_out else self._board.wait_for_words()
        failed = [f"rank {rank} failed: {word}" for rank, word in words.items() if not word.startswith(_PEER_ERROR)]
        hung = {rank: word for rank, word in words.items() if word.startswith(f"{_PEER_ERROR}: {_PREFIX}")}
        if failed:
            text = "; ".join(failed)
        elif timed_out:
            self._ask()
            path = self._write(f"{what} has not ended within {seconds:.1f} s")
            text = f"{_PREFIX}rank {self.rank} waited {seconds:.1f} s in {what}. {self._others(what)} {_REMEDIES} "
            text += _pointer(path)
            self._append(text)
            self._board.post(f"{_PEER_ERROR}: {text}")
        elif hung:
            first, *rest = sorted(hung)
            # what is there was written when that rank called, and says what kept this one then
            there = None if self._written is None else self._written[1]
            path = there or self._write(f"rank {first} waited for other ranks in vain, and has ended")
            also = f" (so did rank {', '.join(map(str, rest))})" if rest else ""
            text = f"rank {first} ended{also}: {hung[first]} This rank, {self.rank}, was in {what} then. "
            text += _pointer(path)
            self._append(text)
        elif words:
            text = "; ".join(f"rank {rank} ended: {word}" for rank, word in words.items())
        else:
            text = f"the connection to the other ranks broke, and none of them said why; see their own output ({error})"
        if timed_out or words or _BROKEN.search(str(error)):
            self.broken = text
        return text

    def _ask(self) -> None:
        """Asks ranks that have not been asked yet where they are, and gives their watchdogs the time to say it."""
        self._board.tell(self._now())
        if len(self._board.told()) == len(self._board.others):
            return
        self._alarms += 1
        self._board.call(self._alarms)
        deadline = time.monotonic() + _LOOKS_TO_ANSWER * self.period
        while len(self._board.told()) < len(self._board.others) and time.monotonic() < deadline:
            time.sleep(_SHORTEST)

    def _now(self) -> str:
        return f"{self._pulse.where()} [at {time.strftime('%H:%M:%S')}]"

    def _others(self, what: str) -> str:
        """Where the other ranks are, as far as they have said."""
        told = self._board.told()
        here = [str(rank) for rank, word in told.items() if word.startswith(f"in {what} ")]
        elsewhere = [f"rank {rank} is {word}" for rank, word in told.items() if str(rank) not in here]
        silent = [f"rank {r} has not said where it is" for r in self._board.others if r not in told]
        listed = [f"There, too: rank {', '.join(here)}"] if here else []
        listed += [*elsewhere, *silent][:_LISTED_RANKS]
        return "; ".join(listed) + "."

    def _append(self, error: str) -> None:
        """Adds the error that follows to the file, which the watchdog wrote earlier."""
        if self._written is None or not self._writing.acquire(timeout=_WRITING_SECONDS):
            return
        try:
            _, path, text = self._written
            _replace(path, f"{text}\n== Error ==\n{error}\n")
        finally:
            self._writing.release()

    def _write(self, reason: str, again: bool = False) -> Path | None:
        """Writes the file, without ``again`` once for each time that this rank gets stuck; ``None`` if it cannot."""
        if not self._writing.acquire(timeout=_WRITING_SECONDS):
            return None
        try:
            beats = self._pulse.beats
            if again or self._written is None or self._written[0] != beats:
                text = describe(self._pulse, self._board, reason, self.timeout)
                for folder in (self._folder, Path(tempfile.gettempdir())):
                    if _replace(folder / self._name, text):
                        self._written = beats, folder / self._name, text
                        break
                else:
                    return None
            return self._written[1]
        finally:
            self._writing.release()


_PEER_ERROR = PeerError.__name__
_REMEDIES = (
    "Every rank has to call the same units, equally often. Look for control flow that depends on the rank, for ranks "
    "with different numbers of batches, and for a rank that is stuck (in data loading, in a callback, at a "
    "breakpoint). Ranks that are merely slow need a longer timeout: timeout_seconds of GeminiStrategy, or timeout of "
    "the process group."
)


def describe(pulse: Pulse, board: Board, reason: str, timeout: float) -> str:
    """All that is known of a rank that is stuck; called from any thread, so it may be slightly inconsistent.

    Args:
        pulse: what the rank is doing.
        board: what the others have said.
        reason: why it is written down.
        timeout: seconds after which a wait for other ranks fails.
    """
    others = {r: f"is {word}" for r, word in board.told().items()}
    others |= {r: f"has ended: {word}" for r, word in board.read().items()}
    parts: Mapping[str, Callable[[], str]] = {
        "Where": pulse.where,
        "Other ranks": lambda: "\n".join(f"rank {r} {others.get(r, 'has not said where it is')}" for r in board.others),
        **pulse.sections,
        "Stacks": _stacks,
    }
    head = (
        f"rank {board.rank} of {board.world_size}: {reason}\n"
        f"{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()} on {socket.gethostname()}; a wait for other "
        f"ranks fails after {timeout:g} s"
    )
    return "\n\n".join([head, *(f"== {title} ==\n{_read(section)}" for title, section in parts.items())]) + "\n"


def _read(section: Callable[[], str]) -> str:
    error: Exception | None = None
    for _ in range(3):  # what is read may change meanwhile
        try:
            return section()
        except Exception as caught:
            error = caught
    return f"could not be read: {error!r}"


def _stacks() -> str:
    """The Python stacks of all threads but a watchdog's own, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, here = threading.main_thread().ident, threading.get_ident()
    frames = sorted(sys._current_frames().items(), key=lambda entry: entry[0] != main)
    texts = (
        f"thread {names.get(ident, 'not made by Python')} ({ident}):\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in frames
        if ident == main or ident != here
    )
    return "\n".join(texts).rstrip()


def _replace(path: Path, text: str) -> bool:
    """Writes a file whole or not at all; whether that worked."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text)
        unfinished.replace(path)
    except OSError:
        return False
    return True


def _pointer(path: Path | None) -> str:
    return "No file could be written." if path is None else f"Stacks and chunks of this rank: {path}"
