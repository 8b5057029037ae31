"""What a round costs when nobody computes anything: fedgrade, stock Flower and NVFlare in turn, deployed, over TLS.

Each has three nodes as processes of their own on loopback. Flower's round is its own federated averaging with training
alone; NVFlare's its own recipe. Payloads differ from round to round where the library would not send them twice.
"""

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import StartRunRequest

from fedgrade.trust.identity import site_id
from server import control as control_module
from server.certificates import certify, create_node_key
from server.control import Control
from server.deployment import Deployment, _free_ports
from server.superlink import QUIET

PEERS: Final = Path(__file__).with_name("peers")
ECHO: Final = Path(__file__).parents[1] / "server" / "echo_node.py"
NODES: Final = 3
NVFLARE: Final = "nvflare==2.9.0"
SIZES: Final = {"1e3": 1_000, "1e6": 1_000_000, "2.5e7 (100 MB)": 25_000_000}
ROUNDS: Final = {"fedgrade": (30, 20, 4), "Flower": (6, 5, 3), "NVFlare": (12, 8, 4)}
TURNS: Final = 2


def null_rounds(*, cache: Path) -> str:
    """The table of seconds a round."""
    nvflare = _nvflare(cache / "nvflare")
    ways: dict[str, Callable[[int, int], list[float]]] = {
        "fedgrade": _fedgrade,
        "Flower": _flower,
        "NVFlare": lambda size, rounds: _nvflare_rounds(nvflare, size, rounds),
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    for _, (place, (size, parameters)) in itertools.product(range(TURNS), enumerate(SIZES.items())):
        for name, way in ways.items():
            found = way(parameters, ROUNDS[name][place])
            seconds.setdefault((name, size), []).extend(found)
            sys.stderr.write(f"null rounds: {name}, {size}: median {statistics.median(found):.2f} s\n")
    return "\n".join(_table(seconds, list(ways)))


def _table(seconds: Mapping[tuple[str, str], list[float]], names: list[str]) -> list[str]:
    lines = ["| parameters | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for size in SIZES:
        cells = []
        for name in names:
            found = seconds[name, size]
            cells.append(f"**{statistics.median(found):.2f}** ({min(found):.2f} to {max(found):.2f}, {len(found)})")
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    said = (
        f"Seconds a round: **median** (least to most, rounds counted). {NODES} nodes; turns of each: {TURNS}, the "
        "first round of each left out. Both SuperLinks keep their state in memory."
    )
    return [*lines, "", said]


def _fedgrade(parameters: int, rounds: int) -> list[float]:
    with _folder() as folder, Deployment(folder) as deployment:
        for number in range(NODES):
            site, key = site_id(f"site-{number}"), folder / f"key-{number}"
            deployment.enrol(site, create_node_key(key))
            command = [sys.executable, str(ECHO), deployment.address, str(deployment.authority), str(key)]
            deployment.start_site(site, command)
        deployment.wait_online()
        return _timed(deployment.control, "fedgrade_rounds", folder, parameters, rounds)


def _flower(parameters: int, rounds: int) -> list[float]:
    with _folder() as folder, contextlib.ExitStack() as stack:
        files = certify(folder / "superlink", ["127.0.0.1"], now=datetime.now(UTC))
        (port, *ports) = _free_ports(NODES + 1)
        address, programs = f"127.0.0.1:{port}", Path(sysconfig.get_path("scripts"))
        path = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {**os.environ, **QUIET, "PATH": path, "FLWR_HOME": str(folder / "flower")}

        def start(program: str, *arguments: str) -> None:
            log = stack.enter_context((folder / f"{program}.log").open("ab"))
            process = subprocess.Popen(
                [str(programs / program), *arguments], env=environment, stdout=log, stderr=log, process_group=0
            )
            stack.callback(_end, process)

        start(
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(port), "--enable-supernode-auth"),
            *("--ssl-ca-certfile", str(files.authority), "--ssl-certfile", str(files.certificate)),
            *("--ssl-keyfile", str(files.key), "--disable-runtime-dependency-installation"),
        )
        control = stack.enter_context(Control(address, authority=files.authority, token=b"none"))
        _until(lambda: control.online() is not None)
        for number, own in enumerate(ports):
            key = folder / f"key-{number}"
            control.register(create_node_key(key), f"site-{number}")
            start(
                "flower-supernode",
                *("--superlink", address, "--root-certificates", str(files.authority), "--port", str(own)),
                *("--auth-supernode-private-key", str(key)),
            )
        _until(lambda: len(control.online()) == NODES)
        return _timed(control, "stock_server", folder, parameters, rounds)


def _nvflare_rounds(python: Path, parameters: int, rounds: int) -> list[float]:
    with _folder() as folder:
        stamps = folder / "stamps.txt"
        command = [str(python), str(PEERS / "nvflare_job.py"), str(parameters), str(rounds), str(stamps)]
        environment = {**os.environ, "HOME": str(folder), "NVFLARE_POC_WORKSPACE": str(folder / "poc")}
        with (folder / "log").open("wb") as log:
            subprocess.run(command, env=environment, check=True, stdout=log, stderr=log, cwd=folder)
        asked: dict[str, list[float]] = {}
        for line in stamps.read_text().splitlines():
            site, _, stamp = line.partition(" ")
            asked.setdefault(site, []).append(float(stamp))
    # A round begins when its last site is asked.
    return _periods([max(one) for one in zip(*asked.values(), strict=True)])


def _nvflare(folder: Path) -> Path:
    """The interpreter of an environment with NVFlare, made if need be: its pins and Flower's exclude each other."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", NVFLARE], check=True)
        (folder / "complete").touch()
    return python


def _timed(control: Control, server: str, folder: Path, parameters: int, rounds: int) -> list[float]:
    """Seconds of each round but the first of a run whose program is ``server``."""
    project = control_module._BUNDLE["pyproject.toml"]
    for old, new in (
        ("run_of_fedgrade", server),
        ("site_of_fedgrade", "stock_client"),
        ('run-directory = ""', 'parameters = 0\nrounds = 0\nstamps = ""'),
    ):
        project = project.replace(old.encode(), new.encode())
    files = {
        "pyproject.toml": project,
        "LICENSE": control_module._BUNDLE["LICENSE"],
        **{f"{name}.py": (PEERS / f"{name}.py").read_bytes() for name in (server, "stock_client")},
    }
    stamps = folder / "stamps.json"
    config = {"parameters": parameters, "rounds": rounds, "stamps": str(stamps)}
    request = StartRunRequest(
        fab=fab_to_proto(control_module._build(files)), override_config=user_config_to_proto(config), federation=""
    )
    run = int(control._client.StartRun(request).run_id)
    _until(lambda: control.status(run).finished, seconds=1200)
    if (status := control.status(run)).outcome != "completed":
        raise RuntimeError(f"{server}: {status.outcome}, {status.details}; logs in {folder}")
    return _periods(json.loads(stamps.read_text()))


def _periods(stamps: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(stamps)]


def _until(done: Callable[[], bool], *, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(Exception):
            if done():
                return
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:.0f} s")
        time.sleep(0.5)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    # Flower's processes start others, which are in their group.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


@contextlib.contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fedgrade-bench-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
