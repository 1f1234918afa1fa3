"""A server in a process of its own, which never outlives this one.

A keeper stands between the two. It ends the server, and all that the server has started, when it is told to, and when
its standard input ends, as it does when this process is killed outright. (vLLM's engine survives its own API server and
keeps the GPU's memory: vllm-project/vllm, issue 55510.) The keeper is this very file, run by itself, so nothing but the
standard library is imported here."""

import atexit
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

# Seconds between two looks of the keeper.
_EVERY = 0.1
_RUNNING: list["ServerProcess"] = []


class ServerProcess:
    """A command that runs until `stop`, `stop_all` or the end of this process, and then has ``grace`` seconds to end by
    itself. What it says is added to ``log``."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path, grace: float = 30.0) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as said:
            self._begin = said.tell()
            self._keeper = subprocess.Popen(
                [sys.executable, "-I", __file__, str(grace), *command],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C in a terminal ends the step first, which then ends the server
            )
        _RUNNING.append(self)

    def ended(self, within: float = 0) -> int | None:
        """The command's exit status, as a shell has it, when it has ended or does so within some seconds."""
        with suppress(subprocess.TimeoutExpired):
            return self._keeper.wait(within)
        return None

    def last_lines(self, count: int = 12) -> str:
        """Of a traceback only the error that it ends with; the log has the rest."""
        from tuneshift_dag import without_frames

        with self.log.open("rb") as file:
            file.seek(self._begin)
            said = without_frames(file.read().decode(errors="replace"))
        return "\n".join(said.strip().splitlines()[-count:])

    def stop(self) -> None:
        """Returns when it has ended, and its memory is free."""
        if self not in _RUNNING:
            return
        _RUNNING.remove(self)
        assert self._keeper.stdin is not None
        with suppress(BrokenPipeError):
            # A word, since a process that was forked meanwhile may hold the pipe open.
            self._keeper.stdin.write(b"stop\n")
            self._keeper.stdin.close()
        if self._keeper.wait() == -signal.SIGKILL:
            _end_session(self._keeper.pid)


def stop_all() -> None:
    """Stop every server of this process."""
    while _RUNNING:
        _RUNNING[-1].stop()


atexit.register(stop_all)


def _end_session(leader: int) -> None:
    """Kill what a keeper has left that was killed itself: all of its session."""
    import psutil

    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getsid(process.pid) == leader:
                process.kill()
                # Whoever is to wait for it clears it away: the first process of a container may never do so.
                while process.status() != psutil.STATUS_ZOMBIE:
                    time.sleep(0.01)


def _keep(grace: float, command: Sequence[str]) -> int:
    """The keeper: run a command until it ends or there is something on standard input; its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # A group of its own, in which all is that the server has started; the session is the keeper's.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0)
    try:
        while server.poll() is None and not select.select([sys.stdin], [], [], _EVERY)[0]:
            pass
    finally:
        if server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(grace)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        status = server.wait()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(_keep(float(sys.argv[1]), sys.argv[2:]))
