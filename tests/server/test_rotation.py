"""Certificates, authority, address, roster and node keys change while coordinator and node run; nobody starts anything.

A coordinator's folder is served by this process, the SuperLink is a process of its own, and the node is a thread that
reads a partner's own files. The tests follow each other.
"""

import re
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from clients.joining import REQUEST, create_site, join, request_to_join
from clients.newest import NewestLink, by_newest_roster
from clients.node import LinkPhase, serve
from clients.node_key import load_node_key
from clients.settings import read_site
from clients.templates import PolicyValues, SiteValues
from fedgrade.data.manifest import write_manifest
from fedgrade.trust.identity import read_roster
from server.authority import Rotation
from server.authority_command import rotate_authority
from server.certificates import certify, read_authorities
from server.coordinator_file import CoordinatorSettings
from server.coordinator_folder import CoordinatorFolder
from server.deployment import _free_ports
from server.enrolment import create_coordinator, enrol, revoke
from server.nodes_file import read_nodes
from server.serving import serve_folder
from tests.clients.test_joining import GRADES, photo
from tests.server.flood import post

pytestmark = pytest.mark.flower

PATIENCE = 60.0


def now():
    return datetime.now(UTC)


class House:
    """A coordinator that serves, and a partner whose node runs."""

    def __init__(self, root):
        self.root, self.coordinator = root, root / "federation"
        self.site_file, self.states = root / "north" / "site.yaml", []
        self.port, admin = _free_ports(2)
        self.stop, self.rosters = threading.Event(), []
        self._changed = threading.Condition()
        create_coordinator(
            self.coordinator,
            CoordinatorSettings(host="127.0.0.1", interface="127.0.0.1", public_port=self.port, admin_port=admin),
            now=now(),
        )
        self.folder = CoordinatorFolder(root=self.coordinator)
        up = threading.Event()
        self._serving = threading.Thread(
            target=serve_folder,
            args=(self.coordinator,),
            kwargs={"stop": self.stop, "on_up": lambda *_: up.set()},
            daemon=True,
        )
        self._serving.start()
        self.create("north")
        self.enrol("north")
        assert up.wait(PATIENCE)
        self.join()
        self._node = threading.Thread(target=self._serve_node, daemon=True)
        self._node.start()
        self.wait_online()

    def create(self, site):
        folder = self.root / site
        (self.root / f"{site}.csv").write_bytes(write_manifest([photo(1), photo(2)]))
        values = SiteValues(
            site=site,
            photos=str(self.root),
            lineage=site,
            cohort="2026-11",
            manifest=str(self.root / f"{site}.csv"),
            declared_items=50,
            photos_per_item=1,
        )
        policy = PolicyValues(
            modes=("local",),
            epsilon_limit=8.0,
            epsilon_per_job=4.0,
            backbones=("tf_efficientnet_lite0",),
            grades=GRADES,
        )
        create_site(folder, values, policy, now=now())

    def enrol(self, site):
        enrol(self.folder, (self.root / site / REQUEST).read_bytes(), approve=lambda _: None, now=now())

    def join(self):
        return join(self.site_file, self.folder.bundle.read_bytes(), approve=lambda _: None)

    def _serve_node(self):
        answer = by_newest_roster(read_site(self.site_file), self.rosters.append, bytes)
        self.answer = answer
        serve(NewestLink(self.site_file), answer, stop=self.stop, on_state=self._note)

    def _note(self, state):
        with self._changed:
            self.states.append(state)
            self._changed.notify_all()

    def wait_online(self, *, after=0):
        """The node's word once it is online again, after so many states."""
        with self._changed:
            assert self._changed.wait_for(
                lambda: any(state.phase is LinkPhase.ONLINE for state in self.states[after:]), PATIENCE
            ), self.states
            return self.states[-1].detail

    def tls(self, *authorities, host="127.0.0.1"):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusted = [one.public_bytes(serialization.Encoding.PEM).decode() for one in authorities]
        context.load_verify_locations(cadata="".join(trusted or [(self.root / "north" / "ca.pem").read_text()]))
        return context.wrap_socket(socket.create_connection(("127.0.0.1", self.port), PATIENCE), server_hostname=host)

    def shown(self):
        """The certificate that a new connection is shown; whoever signed it."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with (
            socket.create_connection(("127.0.0.1", self.port), PATIENCE) as raw,
            context.wrap_socket(raw) as connection,
        ):
            return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True))

    def end(self):
        self.stop.set()
        for thread in (self._node, self._serving):
            thread.join(PATIENCE)
            assert not thread.is_alive()


def eventually(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    running = House(tmp_path_factory.mktemp("house"))
    yield running
    running.end()


def answered(connection):
    """Whether the connection still carries a request and a refusal."""
    connection.sendall(post("/v1/fleet/pull-messages", b"", {}))
    said = b""
    while not said.endswith(b"}"):
        part = connection.recv(4096)
        if not part:
            return False
        said += part
    return said.startswith(b"HTTP/1.1 401")


def test_a_certificate_that_is_about_to_end_is_renewed_and_standing_connections_go_on(house):
    superlink, before = house.coordinator / "superlink", house.shown()
    (superlink / "server.pem").unlink()
    certify(superlink, ["127.0.0.1"], now=now() - timedelta(days=370))
    eventually(lambda: house.shown() != before)
    old, standing, states = house.shown(), house.tls(), len(house.states)
    assert old.not_valid_after_utc < now() + timedelta(days=30)
    assert answered(standing)
    # The hourly look, now.
    settings = house.coordinator / "coordinator.yaml"
    settings.write_text(settings.read_text() + "\n")
    eventually(lambda: house.shown() != old)
    assert house.shown().not_valid_after_utc > now() + timedelta(days=300)
    assert answered(standing)
    standing.close()
    assert all(state.phase is LinkPhase.ONLINE for state in house.states[states:])


def test_another_authority_takes_over_while_the_node_stays(house):
    (old,) = read_authorities(house.coordinator / "superlink")
    standing = house.tls()
    for step in ("announce", "switch", "finish"):
        assert answered(standing)
        states = len(house.states)
        assert Rotation.of(house.coordinator / "superlink").next == step
        rotate_authority.main([str(house.coordinator), "--yes"], standalone_mode=False)
        if house.join().moved:
            house.wait_online(after=states)
        if step == "switch":
            new = read_authorities(house.coordinator / "superlink")[0]
            eventually(lambda new=new: house.shown().issuer == new.subject)
    standing.close()
    assert new != old
    house.tls(new).close()
    with pytest.raises(ssl.SSLCertVerificationError):
        house.tls(old)
    assert house.states[-1].phase is LinkPhase.ONLINE
    assert not any(state.phase is LinkPhase.REFUSED for state in house.states)


def test_a_new_address_in_a_bundle_is_where_the_node_goes(house):
    settings, states = house.coordinator / "coordinator.yaml", len(house.states)
    settings.write_text(re.sub(r'^host: "?127\.0\.0\.1"?', "host: localhost", settings.read_text(), flags=re.MULTILINE))
    eventually(lambda: house.join().bundle.address == f"localhost:{house.port}")
    assert house.wait_online(after=states).endswith(f"at localhost:{house.port}")


def test_a_new_node_key_is_taken_up_when_the_coordinator_has_enrolled_it(house):
    key, states = house.site_file.parent / "node_key", len(house.states)
    old, node = key.read_bytes(), read_nodes(house.coordinator)["north"]
    request_to_join(house.site_file, now=now(), new_node_key=True)
    assert key.read_bytes() == old
    house.enrol("north")
    house.wait_online(after=states)
    eventually(lambda: key.read_bytes() != old)
    assert not key.with_name("node_key.next").exists()
    public = (
        load_node_key(key).public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    assert key.with_name("node_key.pub").read_bytes().strip() == public
    assert read_nodes(house.coordinator)["north"] != node
    eventually(lambda: house.states[-1].phase is LinkPhase.ONLINE)


def test_a_roster_counts_at_the_next_request(house):
    house.create("south")
    house.enrol("south")
    house.join()
    assert house.answer(b"request") == b"request"
    assert set(house.rosters[-1].sites) == {"north", "south"}
    revoke(house.folder, "south", reason="trial", now=now())
    house.join()
    house.answer(b"request")
    assert house.rosters[-1] == read_roster(house.site_file.parent / "roster.json")
    assert set(house.rosters[-1].sites) == {"north"}
