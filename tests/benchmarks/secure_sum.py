"""What a secure sum costs a client and the server: fedgrade's beside Flower's SecAgg+, on the same numbers in one run.

Both run in one process without a network: fedgrade's state machines as a deployment would drive them, and the functions
of flwr's client mod with its server's arithmetic, which has no function of its own to call.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from flwr.client.mod.secure_aggregation.secaggplus_mod import (
    SecAggPlusState,
    _collect_masked_vectors,
    _setup,
    _share_keys,
    _unmask,
)
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_extract,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

from fedgrade.aggregation.secure_sum.coordinator import SumCoordinator, propose
from fedgrade.aggregation.secure_sum.documents import SumProposal, SumTask
from fedgrade.aggregation.secure_sum.masks import Mask, apply_masks
from fedgrade.aggregation.secure_sum.site import SumFloor, SumSite
from fedgrade.trust.canonical import encode
from fedgrade.trust.identity import Roster, SigningKey, site_id

# Sites, numbers in a vector, how many sites vanish before their vector arrives, repetitions. fedgrade tolerates less
# than a third; flwr's server takes half a minute to put 50 sites' shares together.
CASES = (
    (5, 10**5, (0, 1), 5),
    (20, 10**5, (0, 2, 6), 3),
    (50, 10**5, (0, 15), 1),
    (5, 10**6, (0, 1), 3),
    (8, 10**6, (0, 2), 3),
    (20, 10**6, (0, 2, 6), 1),
    (5, 10**7, (0, 1), 1),
)
# flwr's defaults, but for the weight: every client weighs as much, so that the sum is the plain one.
CLIPPING, TARGET, MODULUS = 8.0, 2**22, 2**32
_FLOOR = SumFloor(minimum_participants=2, noise_shares=2)


@dataclass(kw_only=True)
class Tally:
    """Seconds and bytes of one attempt, by who spent them."""

    clients: dict[int, float] = field(default_factory=lambda: defaultdict(float))
    server: float = 0.0
    up: int = 0  # bytes of all clients together
    down: int = 0

    def client(self, number: int, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, its time on the account of one client."""
        began = time.perf_counter()
        result = work()
        self.clients[number] += time.perf_counter() - began
        return result

    def serve(self, work: Callable[[], Any]) -> Any:
        """What ``work`` returns, its time on the server's account."""
        began = time.perf_counter()
        result = work()
        self.server += time.perf_counter() - began
        return result


def secure_sum() -> str:
    """The table of seconds and bytes, a row a case and share of clients that vanish before their vector arrives."""
    columns = ("n", "d", "vanish", "client s", "flwr", "flwr / ours", "… without quantising", "server s", "flwr")
    columns += ("MB up", "flwr", "MB down", "flwr")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for sites, size, vanishing, repetitions in CASES:
        for vanish in vanishing:
            lines.append(_row(sites, size, vanish, repetitions))
            sys.stderr.write(f"secure_sum: {lines[-1]}\n")
    setup = (
        f"One attempt in one process without a network, medians; flwr {version('flwr')} with its defaults (32-bit "
        "modulus, masks from a 32-bit seed, unsigned keys), every client with a share of every other's secrets. "
        "Seconds of a client are those of all its phases together. Without vanishing clients, fedgrade runs all or "
        "nothing: no setup, two phases; otherwise recovery, four phases after setup. flwr has four always. fedgrade "
        "takes integers and checks signatures; flwr takes floating-point numbers and quantises them: the column "
        "without quantising takes that time off. Bytes are those of the protocol, without the model that travels down."
    )
    return "\n".join([setup, "", *lines, "", _streams()])


def _row(sites: int, size: int, vanish: int, repetitions: int) -> str:
    generator = np.random.default_rng(sites * size)
    vectors = [generator.integers(-(2**40), 2**40, size, dtype=np.int64) for _ in range(sites)]
    floats = [(vector / 2.0**38).astype(np.float32) for vector in vectors]
    ours, theirs, quantising = [], [], []
    for _ in range(repetitions):
        ours.append(_fedgrade(vectors, vanish=vanish))
        theirs.append(_flwr(floats, vanish=vanish))
        began = time.perf_counter()
        quantize([floats[0]], CLIPPING, TARGET)
        quantising.append(time.perf_counter() - began)
    client, other = (statistics.median(statistics.median(one.clients.values()) for one in of) for of in (ours, theirs))
    server, other_server = (statistics.median(one.server for one in of) for of in (ours, theirs))
    bare = other - statistics.median(quantising)
    cells = [
        f"{sites}", f"{size:,}", f"{vanish}", f"{client:.3f}", f"{other:.3f}", f"{other / client:.1f}",
        f"{bare / client:.1f}", f"{server:.3f}", f"{other_server:.3f}",
        *(f"{part / sites / 1e6:.3f}" for part in (ours[0].up, theirs[0].up, ours[0].down, theirs[0].down)),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _fedgrade(vectors: Sequence[np.ndarray], *, vanish: int) -> Tally:
    """One attempt; the last ``vanish`` sites' vectors never arrive."""
    tally, keys = Tally(), {site_id(f"site-{number:02d}"): SigningKey.generate() for number in range(len(vectors))}
    roster = Roster(coordinator=SigningKey.generate().public, sites={site: key.public for site, key in keys.items()})
    sites = [SumSite(site=site, key=key, roster=roster) for site, key in keys.items()]
    task = SumTask(
        job="0" * 64, purpose="train", round_index=0, attempt=0, weights_digest="0" * 64, plan_digest="0" * 64,
        size=len(vectors[0]), entry_limit=2**40, tolerated_dropouts=vanish,
    )  # fmt: skip
    announced = {site: machine.announce(task.job) for site, machine in zip(keys, sites, strict=True) if vanish}
    proposal = tally.serve(lambda: propose(task, keys, roster=roster, share_keys=announced))
    coordinator = SumCoordinator(proposal.terms, roster=roster)
    _two_phases(tally, coordinator, dict(zip(keys, sites, strict=True)), proposal, vectors[: len(sites) - vanish])
    if vanish:
        _recover(tally, coordinator, dict(zip(keys, sites, strict=True)))
    for number in range(len(sites) - vanish, len(sites)):
        del tally.clients[number]
    total = tally.serve(coordinator.total)
    if not np.array_equal(total, np.sum(vectors[: len(sites) - vanish], axis=0)):
        raise SystemExit("secure sum: the total is not the plain sum")
    return tally


def _two_phases(
    tally: Tally,
    coordinator: SumCoordinator,
    sites: dict[Any, SumSite],
    proposal: SumProposal,
    vectors: Sequence[np.ndarray],
) -> None:
    """Everybody commits; as many sites as there are vectors send theirs."""
    tally.down += len(sites) * len(encode(proposal))
    for number, (site, machine) in enumerate(sites.items()):
        raw = tally.client(
            number, lambda machine=machine: machine.commit(proposal, task=proposal.terms.task, floor=_FLOOR)
        )
        tally.up += len(raw)
        tally.serve(lambda site=site, raw=raw: coordinator.accept_commitment(site, raw))
    commitments = tally.serve(coordinator.commitments)
    tally.down += len(sites) * len(encode(commitments))
    for number, ((site, machine), vector) in enumerate(zip(sites.items(), vectors, strict=False)):
        tally.client(number, lambda machine=machine: machine.confirm(commitments))
        upload = tally.client(number, lambda machine=machine, vector=vector: machine.mask(vector))
        tally.up += len(upload.document) + upload.vector.nbytes
        tally.serve(lambda site=site, up=upload: coordinator.accept_vector(site, up.document, up.vector))


def _recover(tally: Tally, coordinator: SumCoordinator, sites: dict[Any, SumSite]) -> None:
    """Survivors vote and reveal."""
    survivors = tally.serve(coordinator.survivors)
    numbers = {site: number for number, site in enumerate(sites)}
    tally.down += len(survivors.survivors) * len(encode(survivors))
    for site in survivors.survivors:
        raw = tally.client(numbers[site], lambda site=site: sites[site].vote(survivors))
        tally.up += len(raw)
        tally.serve(lambda site=site, raw=raw: coordinator.accept_vote(site, raw))
    votes = tally.serve(coordinator.votes)
    tally.down += len(survivors.survivors) * len(encode(votes))
    for site in survivors.survivors:
        raw = tally.client(numbers[site], lambda site=site: sites[site].reveal(votes))
        tally.up += len(raw)
        tally.serve(lambda site=site, raw=raw: coordinator.accept_shares(site, raw))


def _flwr(vectors: Sequence[np.ndarray], *, vanish: int) -> Tally:
    """One attempt with the functions of flwr's mod; the last ``vanish`` clients' vectors never arrive."""
    tally, clients = Tally(), len(vectors)
    states = [SecAggPlusState() for _ in vectors]
    setup = {
        Key.SAMPLE_NUMBER: clients, Key.SHARE_NUMBER: clients, Key.THRESHOLD: clients - (vanish or (clients - 1) // 3),
        Key.CLIPPING_RANGE: CLIPPING, Key.TARGET_RANGE: TARGET, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: 1000.0,
    }  # fmt: skip
    keys = {}
    for number, state in enumerate(states):
        state.nid = number + 1
        answer = tally.client(number, lambda state=state: _setup(state, setup))
        keys[str(state.nid)] = (answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2])
        tally.up += _size(answer.values())
    inbox = defaultdict(list)
    for number, state in enumerate(states):
        tally.down += _size(part for pair in keys.values() for part in pair)
        answer = tally.client(number, lambda state=state: _share_keys(state, keys))
        tally.up += _size(answer[Key.CIPHERTEXT_LIST])
        for to, text in zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True):
            inbox[to].append((state.nid, text))
    total: Any = None
    for number, state in enumerate(states[: clients - vanish]):
        sources, texts = zip(*inbox[state.nid], strict=True)
        tally.down += _size(texts)
        configs = {Key.SOURCE_LIST: list(sources), Key.CIPHERTEXT_LIST: list(texts)}
        parameters = ndarrays_to_parameters([vectors[number]])
        answer = tally.client(
            number,
            lambda state=state, configs=configs, parameters=parameters: _collect_masked_vectors(
                state, configs, 1000, parameters
            ),
        )
        tally.up += _size(answer[Key.MASKED_PARAMETERS])
        total = tally.serve(lambda answer=answer, total=total: _added(total, answer[Key.MASKED_PARAMETERS]))
    _finish(tally, states, total, vanish=vanish)
    return tally


def _finish(tally: Tally, states: Sequence[Any], total: Any, *, vanish: int) -> None:
    """The last phase, and the arithmetic of flwr's server after it."""
    nids = [state.nid for state in states]
    alive, dead = nids[: len(nids) - vanish], nids[len(nids) - vanish :]
    shares = defaultdict(list)
    for nid in alive:
        configs = {Key.ACTIVE_NODE_ID_LIST: list(alive), Key.DEAD_NODE_ID_LIST: list(dead)}
        answer = tally.client(nid - 1, lambda nid=nid, configs=configs: _unmask(states[nid - 1], configs))
        tally.up += _size(answer[Key.SHARE_LIST])
        tally.down += 8 * len(nids)
        for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
            shares[owner].append(share)
    for nid in dead:
        del tally.clients[nid - 1]
    total = tally.serve(lambda: _unmasked(parameters_mod(total, MODULUS), states, shares, alive=alive))
    if factor_extract(total)[0] != len(alive) * TARGET:
        raise SystemExit("flwr: the masks did not cancel")


def _unmasked(total: Any, states: Sequence[Any], shares: dict[int, list[bytes]], *, alive: Sequence[int]) -> Any:
    shapes = [part.shape for part in total]
    for nid, parts in shares.items():
        secret = combine_shares(parts)
        if nid in alive:
            total = parameters_subtraction(total, pseudo_rand_gen(secret, MODULUS, shapes))
            continue
        for neighbour in alive:
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(states[neighbour - 1].pk1))
            mask = pseudo_rand_gen(key, MODULUS, shapes)
            total = (parameters_addition if nid > neighbour else parameters_subtraction)(total, mask)
    return parameters_mod(total, MODULUS)


def _added(total: Any, parts: Sequence[bytes]) -> Any:
    arrays = [bytes_to_ndarray(part) for part in parts]
    return arrays if total is None else parameters_addition(total, arrays)


def _size(parts: Any) -> int:
    return sum(len(part) for part in parts)


def _streams() -> str:
    """Milliseconds a million numbers and peer: the mask as it is, and what else could have made it."""
    size, block, repetitions = 10**6, 2**14, 15
    seed, zeros, buffer = bytes(range(32)), bytes(8 * block), bytearray(8 * block + 16)
    vector, words = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.uint64)
    stream = np.frombuffer(buffer, dtype="<u8", count=block)

    def added(cipher: Cipher[Any]) -> None:
        encryptor = cipher.encryptor()
        for start in range(0, size, block):
            part = words[start : start + block]
            encryptor.update_into(zeros[: part.nbytes], buffer)
            part += stream[: part.size]

    mask = Mask(seed=bytearray(seed), negative=False)
    ways: dict[str, Callable[[], Any]] = {
        "fedgrade: AES-256-CTR, added": lambda: apply_masks(vector, [mask] * 8),
        "ChaCha20, added": lambda: added(Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None)),
        "flwr: `pseudo_rand_gen`, not yet added": lambda: pseudo_rand_gen(seed, MODULUS, [(size,)]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append((time.perf_counter() - began) / (8 if way is ways[next(iter(ways))] else 1))
    lines = ["| mask | ms a million numbers and peer, median | least |", "|---|---|---|"]
    lines += [
        f"| {name} | {1e3 * statistics.median(taken):.2f} | {1e3 * min(taken):.2f} |" for name, taken in seconds.items()
    ]
    return "\n".join(lines)
