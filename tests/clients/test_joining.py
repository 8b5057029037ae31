"""A partner's way in: files made once, a bundle taken only from the right coordinator, and nothing half-written."""

import io
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
import yaml
from click.testing import CliRunner

from clients.commands import site as commands
from clients.joining import BUNDLE, REQUEST, create_site, join, request_to_join, with_address
from clients.leaving import leave, require_not_left
from clients.node_key import load_node_key
from clients.settings import read_site
from clients.templates import PolicyValues, SiteValues
from fedgrade.data.manifest import Photo, Provenance, Split, write_manifest
from fedgrade.errors import DataRefused, DocumentRefused, FedgradeError, SignatureRefused
from fedgrade.federation.policy import Policy
from fedgrade.trust.canonical import decode_yaml
from fedgrade.trust.enrolment import JoinBundle, read_request, utc_text, write_bundle
from fedgrade.trust.identity import Roster, SigningKey, read_roster
from server.certificates import certify

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
GRADES = ("intact", "probably intact", "defective")
COORDINATOR, STRANGER = SigningKey.generate(), SigningKey.generate()


def photo(number, grade="intact"):
    return Photo(
        path=f"cell{number}.png",
        digest=f"{number:064x}",
        item=f"item-{number}",
        source=f"module-{number}",
        grade=grade,
        split=Split.TRAIN,
        provenance=Provenance.REAL,
        licence="ours",
        origin="line 4",
    )


@pytest.fixture
def home(tmp_path):
    """A folder with photos and their manifest, as a partner has them before anything else."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "manifest.csv").write_bytes(write_manifest([photo(1), photo(2, "defective")]))
    return tmp_path


def values(home, **changes):
    given = {
        "site": "north",
        "photos": str(home / "photos"),
        "lineage": "pumps",
        "cohort": "2026-11",
        "manifest": str(home / "manifest.csv"),
        "declared_items": 400,
        "photos_per_item": 3,
    }
    return SiteValues(**{**given, **changes})


POLICY = PolicyValues(
    modes=("local",), epsilon_limit=8.0, epsilon_per_job=4.0, backbones=("tf_efficientnet_lite0",), grades=GRADES
)


@pytest.fixture
def partner(home):
    """``site.yaml`` of a site that has not joined yet."""
    create_site(home / "node", values(home), POLICY, now=NOW)
    return home / "node" / "site.yaml"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return certify(tmp_path_factory.mktemp("tls"), [], now=datetime.now(UTC)).authority.read_text()


@pytest.fixture
def bundle(partner, authority):
    return bundle_of(read_request((partner.parent / REQUEST).read_bytes()), authority)


def bundle_of(own, authority):
    """A bundle that names the site of the request ``own``, and a second one."""
    return JoinBundle(
        sequence=2,
        issued=utc_text(NOW),
        address="coordinator.example:8443",
        authority=authority,
        roster=Roster(coordinator=COORDINATOR.public, sites={"north": own.key, "south": STRANGER.public}),
    )


def taken(partner, bundle, key=COORDINATOR):
    return join(partner, write_bundle(bundle, key), approve=lambda _: None)


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_site_has_all_it_needs_and_its_secrets_to_itself(partner):
    folder = partner.parent
    assert {path.name for path in folder.iterdir()} == {
        *("key.pem", "node_key", "node_key.pub", "site.yaml", "policy.yaml", REQUEST)
    }
    assert folder.stat().st_mode & 0o077 == 0
    for secret in ("key.pem", "node_key"):
        assert (folder / secret).stat().st_mode & 0o777 == 0o600
    assert decode_yaml(Policy, (folder / "policy.yaml").read_bytes()).grades == GRADES
    request = read_request((folder / REQUEST).read_bytes())
    assert request.key == SigningKey.load(folder / "key.pem").public
    assert request.node_key == (folder / "node_key.pub").read_text().strip()
    assert load_node_key(folder / "node_key").public_key()
    assert (request.site, request.declared_items) == ("north", 400)


def test_what_is_there_is_never_overwritten(partner, home):
    before = content(partner.parent)
    with pytest.raises(DocumentRefused, match="exists and is not overwritten"):
        create_site(partner.parent, values(home), POLICY, now=NOW)
    assert content(partner.parent) == before


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"site": "../north"}, DocumentRefused),
        ({"site": "coordinator"}, DocumentRefused),
        ({"declared_items": 0}, DocumentRefused),
        ({"manifest": "nowhere.csv"}, DocumentRefused),
        ({"photos": "a\nkey: b"}, DocumentRefused),
    ],
)
def test_values_that_cannot_be_leave_nothing_behind(home, changes, kind):
    (home / "node").mkdir()
    with pytest.raises(kind):
        create_site(home / "node", values(home, **changes), POLICY, now=NOW)
    assert list((home / "node").iterdir()) == []


def test_a_manifest_by_other_grades_is_refused_before_keys_are_made(home):
    with pytest.raises(DataRefused, match="defective"):
        create_site(home / "node", values(home), replace(POLICY, grades=("intact", "broken")), now=NOW)
    assert not (home / "node").exists()


def test_a_site_that_has_not_joined_says_so(partner):
    with pytest.raises(DocumentRefused, match="fedgrade site join"):
        _ = read_site(partner).link


def test_a_request_is_made_anew_from_what_the_site_file_says(partner):
    partner.write_text(partner.read_text().replace("declared_items: 400", "declared_items: 650"))
    later = request_to_join(partner, now=NOW + timedelta(days=1))
    assert later.declared_items == 650
    assert read_request((partner.parent / REQUEST).read_bytes()) == later


def test_a_second_new_connection_key_is_refused_while_the_first_one_waits(partner):
    first = request_to_join(partner, now=NOW, new_node_key=True)
    typed = CliRunner().invoke(commands, ["request", "--new-node-key", str(partner)])
    assert isinstance(typed.exception, DocumentRefused)
    assert "waits already for the coordinator to enrol it" in str(typed.exception)
    again = CliRunner().invoke(commands, ["request", str(partner)])
    assert again.exit_code == 0, again.output
    assert read_request((partner.parent / REQUEST).read_bytes()).node_key == first.node_key


def test_a_bundle_puts_everything_in_its_place_and_keeps_the_comments(partner, bundle):
    before = partner.read_text()
    joined = taken(partner, bundle)
    assert joined.arrived == ("north", "south")
    assert (joined.left, joined.moved) == ((), False)
    site = read_site(partner)
    assert site.link.address == bundle.address
    assert site.link.root_certificate.read_text() == bundle.authority
    assert read_roster(partner.parent / "roster.json") == bundle.roster
    assert partner.read_text() == before.replace('address: ""', 'address: "coordinator.example:8443"')


def test_a_later_bundle_says_who_is_new_and_who_left(partner, bundle):
    taken(partner, bundle)
    east = SigningKey.generate().public
    later = replace(
        bundle,
        sequence=5,
        address="other.example:8443",
        roster=replace(bundle.roster, sites={"north": bundle.roster.sites["north"], "east": east}),
    )
    joined = taken(partner, later)
    assert (joined.arrived, joined.left, joined.moved) == (("east",), ("south",), True)
    assert read_site(partner).link.address == "other.example:8443"


def test_the_same_bundle_may_be_taken_twice(partner, bundle):
    taken(partner, bundle)
    assert taken(partner, bundle).arrived == ()


def test_a_site_that_had_left_is_told_that_it_is_back_and_what_becomes_of_its_notice(partner, bundle, tmp_path):
    (tmp_path / "bundle.json").write_bytes(write_bundle(bundle, COORDINATOR))
    arguments = ["join", str(tmp_path / "bundle.json"), str(partner)]
    first = CliRunner().invoke(commands, [*arguments, "--fingerprint", COORDINATOR.public.fingerprint])
    assert first.exit_code == 0, first.output
    assert "had left" not in first.output
    site = read_site(partner)
    leave(site, now=NOW)
    # The bundle that it had when it left, put back.
    again = CliRunner().invoke(commands, arguments)
    assert again.exit_code == 0, again.output
    assert "This site had left. It belongs to the coordinator again: its leave notice is gone" in again.output
    assert "send a new join request" in again.output
    require_not_left(site)
    assert "had left" not in CliRunner().invoke(commands, arguments).output


@pytest.mark.parametrize("changes", [{"sequence": 1}, {"address": "evil.example:1"}])
def test_an_older_bundle_does_not_bring_back_a_site_that_left(partner, bundle, changes):
    taken(partner, bundle)
    leave(read_site(partner), now=NOW)
    refused(partner, replace(bundle, **changes), DocumentRefused, "this site has number 2")


def test_an_interrupted_join_is_finished_by_the_same_bundle(partner, bundle):
    taken(partner, bundle)
    (partner.parent / BUNDLE).unlink()
    taken(partner, bundle)
    assert (partner.parent / BUNDLE).exists()


def refused(partner, bundle, kind, said, key=COORDINATOR):
    before = content(partner.parent)
    with pytest.raises(kind, match=said):
        taken(partner, bundle, key)
    assert content(partner.parent) == before


def test_an_older_bundle_is_refused(partner, bundle):
    taken(partner, bundle)
    refused(partner, replace(bundle, sequence=1), DocumentRefused, "this site has number 2")


def test_two_bundles_of_one_number_are_refused(partner, bundle):
    taken(partner, bundle)
    refused(partner, replace(bundle, address="evil.example:1"), DocumentRefused, "this site has number 2")


def test_another_coordinator_s_bundle_is_refused_once_there_is_one(partner, bundle):
    taken(partner, bundle)
    usurper = SigningKey.generate()
    other = replace(bundle, sequence=9, roster=replace(bundle.roster, coordinator=usurper.public))
    refused(partner, other, SignatureRefused, "A site keeps its coordinator", usurper)


def test_a_bundle_without_this_site_is_refused(partner, bundle):
    others = replace(bundle.roster, sites={"south": STRANGER.public})
    refused(partner, replace(bundle, roster=others), DocumentRefused, "send the coordinator join-request.json")
    taken(partner, bundle)
    refused(partner, replace(bundle, sequence=3, roster=others), DocumentRefused, "it was revoked")


def test_a_bundle_that_names_this_site_with_another_key_is_refused(partner, bundle):
    others = replace(bundle.roster, sites={"north": SigningKey.generate().public})
    refused(partner, replace(bundle, roster=others), SignatureRefused, "this site's own is")


def test_a_bundle_that_was_altered_is_refused(partner, bundle):
    raw = write_bundle(bundle, COORDINATOR)
    before = content(partner.parent)
    for altered in (raw.replace(b"e", b"f", 1), raw[:-20], b"{}", b"", raw + raw):
        with pytest.raises(FedgradeError):
            join(partner, altered, approve=lambda _: None)
    assert content(partner.parent) == before


def test_a_coordinator_whose_fingerprint_is_not_the_one_that_was_told_is_refused(partner, bundle):
    (partner.parent / "taken.json").write_bytes(write_bundle(bundle, COORDINATOR))
    before = content(partner.parent)
    run = CliRunner()
    arguments = ["join", str(partner.parent / "taken.json"), str(partner)]
    wrong = run.invoke(commands, [*arguments, "--fingerprint", STRANGER.public.fingerprint])
    assert isinstance(wrong.exception, SignatureRefused)
    # No terminal to ask at.
    silent = run.invoke(commands, arguments)
    assert isinstance(silent.exception, DocumentRefused)
    assert COORDINATOR.public.fingerprint in str(silent.exception)
    assert content(partner.parent) == before
    right = run.invoke(commands, [*arguments, "--fingerprint", COORDINATOR.public.fingerprint])
    assert right.exit_code == 0, right.output
    assert "new: south" in right.output


def test_init_as_typed_and_what_is_missing_is_named(home):
    arguments = ["init", str(home / "node"), "--site", "north", "--photos", str(home / "photos")]
    missing = CliRunner().invoke(commands, [*arguments, "--manifest", str(home / "manifest.csv")])
    assert missing.exit_code == 2
    assert "--declared-items" in missing.output
    assert not (home / "node").exists()
    whole = CliRunner().invoke(
        commands,
        [
            *(*arguments, "--manifest", str(home / "manifest.csv"), "--declared-items", "400"),
            *("--grades", ", ".join(GRADES)),
        ],
    )
    assert whole.exit_code == 0, whole.output
    key = SigningKey.load(home / "node" / "key.pem").public
    assert key.fingerprint in whole.output
    again = CliRunner().invoke(commands, ["request", str(home / "node" / "site.yaml")])
    assert key.fingerprint in again.output


class Terminal(io.StringIO):
    """Somebody who types at a terminal."""

    def isatty(self):
        return True


def test_what_is_missing_is_asked_for_at_a_terminal(home, monkeypatch, capsys):
    typed = ["north", str(home / "photos"), str(home / "manifest.csv"), "400", ", ".join(GRADES)]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(typed) + "\n"))
    commands.main(["init", str(home / "node")], standalone_mode=False)
    settings = read_site(home / "node" / "site.yaml").settings
    assert (settings.site, settings.declared_items, settings.photos) == ("north", 400, str(home / "photos"))
    assert decode_yaml(Policy, (home / "node" / "policy.yaml").read_bytes()).grades == GRADES
    assert "Grades, best to worst" in capsys.readouterr().out


def test_an_answer_that_cannot_be_is_asked_for_again_and_home_is_found(home, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(home))
    typed = ["north", "~/fotos", "~/photos", "~/manifest.csv", "abc", "0", "400", ", ".join(GRADES)]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(typed) + "\n"))
    commands.main(["init", "~/node"], standalone_mode=False)
    settings = read_site(home / "node" / "site.yaml").settings
    assert (settings.declared_items, settings.photos) == (400, str(home / "photos"))
    assert settings.cohorts[f"{datetime.now(UTC):%Y-%m}"].manifest == str(home / "manifest.csv")
    asked = capsys.readouterr().out
    assert f"'{home}/fotos' does not exist" in asked
    assert "'abc' is not a valid integer" in asked


def test_a_home_that_nobody_has_is_one_line(home):
    arguments = ["init", str(home / "node"), "--photos", "~nobody-of-that-name/photos"]
    refused = CliRunner().invoke(commands, arguments)
    assert refused.exit_code == 2
    assert "~nobody-of-that-name/photos" in refused.output


@pytest.mark.parametrize("flow", [False, True])
def test_an_address_is_replaced_where_it_has_a_line_and_otherwise_left_to_the_partner(partner, flow):
    before = partner.read_text()
    text = yaml.safe_dump(yaml.safe_load(before), sort_keys=False, default_flow_style=flow)
    if flow:
        with pytest.raises(DocumentRefused, match=r"set link\.address to a:1 by hand"):
            with_address(text, "a:1")
    else:
        assert yaml.safe_load(with_address(text, "a:1"))["link"]["address"] == "a:1"
