"""The steps of a round, and a trip wire at each: whoever gets to one that a test has set kills its victim with SIGKILL.

Loaded by the tests' own programs (house.py, run_of_faults.py), which run the product's code and nothing in its place.
A wire is a file below the federation's folder, named for the process and the step; it goes off once.
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

# Where in a job a process is, purpose and round, before anything is asked of it.
BEGINNING: tuple[str, int] = ("admission", 0)
_STOPPED_WITHIN_SECONDS = 10.0
# In the environment of every process of one federation: its folder.
MARK = "FEDGRADE_FAULTS"
RUN = "run"  # the ServerApp's process; sites go by their names
SERVE, SUPERLINK, SUPEREXEC, KEEPER, HOUSE = "serve", "superlink", "superexec", "keeper", "house"
_WORDS = {
    SUPERLINK: "server.superlink",
    SUPEREXEC: "flower-superexec",
    RUN: "flwr-serverapp",
    KEEPER: "keeper.py",
    SERVE: "serve",
}


@dataclass(frozen=True)
class Step:
    """Where in the product's code a step is: before or after the call of ``name`` in ``module``.

    ``held``: a site that dies after the call does nothing from before the call on (SIGSTOP). Without that it is a
    matter of luck how far it came with what the call sent to it.
    """

    module: str
    name: str
    after: bool
    held: bool = False

    def wire(self, hold: Callable[[], AbstractContextManager[None]], called: Callable[[], None]) -> None:
        """Have ``called`` called whenever a process gets here, and the call made in ``hold`` if it is ``held``."""
        *owners, name = self.name.split(".")
        owner = import_module(self.module)
        for one in owners:
            owner = getattr(owner, one)
        real = getattr(owner, name)

        def wired(*arguments: object, **named: object) -> object:
            with hold() if self.held else nullcontext():
                if not self.after:
                    called()
                result = real(*arguments, **named)
                if self.after:
                    called()
            return result

        setattr(owner, name, wired)


_SITE, _CHARGING, _SUMS = "fedgrade.federation.site", "fedgrade.federation.charging", "fedgrade.federation.sum_desk"
_ROUNDS, _CONVERSATION = "fedgrade.federation.rounds", "fedgrade.federation.sum_conversation"
SITE_STEPS = {
    "shown the job": Step(_CHARGING, "Charging.accept", after=False),
    "admitted it": Step(_CHARGING, "Charging.witness", after=True),
    "before the charge": Step(_CHARGING, "Charging.reserve", after=False),
    "charged": Step(_CHARGING, "Charging.reserve", after=True),
    "committed to its ledger": Step(_CHARGING, "Charging.commit", after=True),
    "reply kept, not sent": Step("fedgrade.federation.outbox", "Outbox.keep", after=True),
    "reply announced": Step("clients.fleet", "FleetConnection._announce", after=True),
    "reply sent": Step("clients.fleet", "FleetConnection.send", after=True),
}
SUM_SITE_STEPS = {
    "committed to a set": Step(_SUMS, "SumDesk.commit", after=True),
    "masked": Step(_SUMS, "SumDesk.mask", after=True),
    "voted": Step(_SUMS, "SumDesk.vote", after=True),
    "revealed": Step(_SUMS, "SumDesk.reveal", after=True),
}
RUN_STEPS = {
    "request on its way": Step("server.grid_cohort", "GridCohort._push", after=True, held=True),
    "replies in hand": Step(_ROUNDS, "_advance", after=False),
    "checkpoint": Step("fedgrade.federation.store", "RunStore.save", after=True),
    "ledger": Step(_ROUNDS, "RoundLog.close_round", after=True),
    "model written": Step(_ROUNDS, "publish", after=True),
    "model in the ledger": Step(_ROUNDS, "RoundLog.release", after=True),
}
SUM_RUN_STEPS = {
    "set proposed": Step("fedgrade.federation.store", "RunStore.keep_sum", after=True),
    "all committed": Step(_CONVERSATION, "SumConversation._finished", after=False),
    "vectors in hand": Step(_CONVERSATION, "SumConversation._vectors", after=True),
    "votes in hand": Step(_CONVERSATION, "SumConversation._voted", after=True),
    "shares in hand": Step(_CONVERSATION, "SumConversation._revealed", after=True),
}


@dataclass(frozen=True)
class Process:
    """A live process of one federation: ``kind`` is one of the constants above, or the name of a site."""

    number: int
    kind: str


def processes(folder: Path, sites: tuple[str, ...]) -> Iterator[Process]:
    """Every live process of the federation in ``folder``, by the mark in its environment."""
    mark = f"{MARK}={folder}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        with suppress(OSError):
            if _state(int(entry.name)) == "Z" or mark not in (entry / "environ").read_bytes().split(b"\0"):
                continue
            name, words = (entry / "comm").read_text().strip(), (entry / "cmdline").read_bytes().decode().split("\0")
            kinds = (
                kind for kind, word in _WORDS.items() if any(one == word or one.endswith(f"/{word}") for one in words)
            )
            yield Process(number=int(entry.name), kind=name if name in sites else next(kinds, HOUSE))


def set_wire(folder: Path, *, process: str, step: str, victim: str, place: tuple[str, int]) -> Path:
    """Have ``victim`` killed when ``process`` gets to ``step`` at this purpose and round; what exists once it was."""
    wire = _wire(folder, process, step)
    wire.parent.mkdir(exist_ok=True)
    wire.write_text(json.dumps({"victim": victim, "place": place}))
    return wire.with_suffix(".sprung")


def _wire(folder: Path, process: str, step: str) -> Path:
    return folder / "wires" / f"{process} {step}".replace(" ", "-").replace(",", "")


class Wires:
    """The wires of this process, which is ``process`` of the federation in ``folder``."""

    def __init__(self, folder: Path, process: str, sites: tuple[str, ...]) -> None:
        self.place = BEGINNING
        self._folder = folder
        self._process = process
        self._sites = sites

    def stretch(self, steps: dict[str, Step]) -> None:
        """A wire at each of ``steps``."""
        for name, step in steps.items():
            step.wire(lambda name=name: self.hold(name), lambda name=name: self.pull(name))

    @contextmanager
    def hold(self, step: str) -> Iterator[None]:
        """While this is open, the site that the wire at ``step`` names does nothing, if one is set for now."""
        if (victim := self._victim(step)) not in self._sites:
            yield
            return
        deadline = time.monotonic() + _STOPPED_WITHIN_SECONDS
        while not (held := self._signal(victim, signal.SIGSTOP)) or not all(_state(number) == "T" for number in held):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{victim} is not there, or cannot be stopped")
            time.sleep(0.01)
        try:
            yield
        finally:
            # If it was not killed, because the step failed.
            self._signal(victim, signal.SIGCONT)

    def pull(self, step: str) -> None:
        """Kill whom the wire at ``step`` names, if one is set for where the job is now."""
        if (victim := self._victim(step)) is None:
            return
        wire = _wire(self._folder, self._process, step)
        wire.rename(wire.with_suffix(".sprung"))
        if victim == self._process:
            os.kill(os.getpid(), signal.SIGKILL)
        self._signal(victim, signal.SIGKILL)

    def _victim(self, step: str) -> str | None:
        """Who dies here and now."""
        try:
            said = json.loads(_wire(self._folder, self._process, step).read_bytes())
        except FileNotFoundError:
            return None
        return said["victim"] if said["place"] == list(self.place) else None

    def _signal(self, victim: str, sign: signal.Signals) -> list[int]:
        """Send ``sign`` to every process of ``victim``; which those are."""
        found = [process.number for process in processes(self._folder, self._sites) if process.kind == victim]
        for number in found:
            # Whoever was killed a moment ago may be gone by now.
            with suppress(ProcessLookupError):
                os.kill(number, sign)
        return found


def _state(number: int) -> str:
    """The state of a process as in proc(5): Z for one that is dead and T for one that is stopped.

    Raises:
        OSError: there is no such process.
    """
    return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
