"""A network of its own for partners' nodes, joined to this machine's by a wire that delays, drops and is cut.

Two TUN devices, one on either side, and this process between them, packet by packet: no kernel module for bad networks
is needed, and devices and network are gone with the last process in it. ``python bad_link.py <settings file>`` prints
its process id once the wire is up; the file says how bad it is, and is read again whenever it changes.
"""

import ctypes
import fcntl
import heapq
import json
import os
import random
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

NEAR, FAR = "10.203.0.1", "10.203.0.2"
NEAR_DEVICE, FAR_DEVICE = "fedgrade-near", "fedgrade-far"
_CLONE_NEWNET = 0x40000000  # os.unshare came with Python 3.12
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MTU = 65536
_LOOK_SECONDS = 0.02


def device(name, *, own, other):
    """A TUN device in this process's network, up, with its address and the way to ``other``."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    for command in (["addr", "add", own, "peer", other, "dev", name], ["link", "set", name, "up"]):
        subprocess.run(["ip", *command], check=True)
    return descriptor


def carry(near, far, settings):
    """Packets from one side to the other, as badly as ``settings`` say, until standard input ends."""
    chance = random.Random(0)  # noqa: S311 - packets are lost, nothing is kept secret
    queue, version, said = [], None, {}
    while True:
        if (now := settings.stat().st_mtime_ns) != version:
            version, said = now, json.loads(settings.read_text())
        wait = max(0.0, queue[0][0] - time.monotonic()) if queue else _LOOK_SECONDS
        ready, _, _ = select.select([near, far, sys.stdin], [], [], min(wait, _LOOK_SECONDS))
        if sys.stdin in ready:
            return
        for source in ready:
            packet = os.read(source, _MTU)
            if said["cut"] or chance.random() < said["loss"]:
                continue
            due = time.monotonic() + max(0.0, said["delay"] + said["jitter"] * chance.uniform(-1, 1))
            # The number keeps packets that are due at one moment apart.
            heapq.heappush(queue, (due, chance.random(), far if source == near else near, packet))
        while queue and queue[0][0] <= time.monotonic():
            _, _, target, packet = heapq.heappop(queue)
            os.write(target, packet)


def main():
    settings = Path(sys.argv[1])
    near = device(NEAR_DEVICE, own=NEAR, other=FAR)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    far = device(FAR_DEVICE, own=FAR, other=NEAR)
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    carry(near, far, settings)


if __name__ == "__main__":
    main()
