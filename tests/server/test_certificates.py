import stat
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from fedgrade.errors import DocumentRefused
from server.authority import Rotation, Step
from server.certificates import certify, create_node_key, read_authorities

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def certificate(path):
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_the_certificate_names_public_hosts_and_loopback_and_is_signed_by_the_authority(tmp_path):
    files = certify(tmp_path, ["superlink.example.org", "192.0.2.7", "2001:db8::7"], now=NOW)
    server, authority = certificate(files.certificate), certificate(files.authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"superlink.example.org", "localhost"}
    assert {str(address) for address in names.get_values_for_type(x509.IPAddress)} == {
        "192.0.2.7",
        "2001:db8::7",
        "127.0.0.1",
    }
    server.verify_directly_issued_by(authority)


def test_private_keys_are_for_their_owner_alone(tmp_path):
    certify(tmp_path / "pki", [], now=NOW)
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((tmp_path / "pki" / name).stat().st_mode) == 0o600


def test_asking_again_changes_nothing(tmp_path):
    certify(tmp_path, ["a.example"], now=NOW)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    certify(tmp_path, ["a.example"], now=NOW + timedelta(days=300))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("hosts", "later"), [(["b.example"], 1), (["a.example"], 380)])
def test_a_certificate_that_no_longer_fits_is_renewed_with_the_same_keys(tmp_path, hosts, later):
    files = certify(tmp_path, ["a.example"], now=NOW)
    before = {name: (tmp_path / name).read_bytes() for name in ("ca.key", "server.key", "ca.pem", "server.pem")}
    certify(tmp_path, hosts, now=NOW + timedelta(days=later))
    after = {name: (tmp_path / name).read_bytes() for name in before}
    assert {name for name in before if before[name] != after[name]} == {"server.pem"}
    certificate(files.certificate).verify_directly_issued_by(certificate(files.authority))


def test_older_names_stay_so_that_partners_with_an_older_bundle_still_connect(tmp_path):
    certify(tmp_path, ["a.example"], now=NOW)
    files = certify(tmp_path, ["b.example"], now=NOW)
    names = certificate(files.certificate).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert set(names.get_values_for_type(x509.DNSName)) == {"a.example", "b.example", "localhost"}


def test_an_authority_that_is_about_to_end_is_certified_anew_with_its_key(tmp_path):
    files = certify(tmp_path, [], now=NOW)
    before = certificate(files.authority)
    certify(tmp_path, [], now=NOW + timedelta(days=3640))
    after = certificate(files.authority)
    assert after.public_key() == before.public_key()
    assert after.not_valid_after_utc > before.not_valid_after_utc
    # Partners who still hold the older one are not cut off.
    certificate(files.certificate).verify_directly_issued_by(before)


def steps(folder):
    while (rotation := Rotation.of(folder)).next is not Step.FINISH:
        yield rotation.take(rotation.next, now=NOW)
    yield rotation.take(Step.FINISH, now=NOW)


def test_another_authority_takes_over_in_three_steps(tmp_path):
    files = certify(tmp_path, ["a.example"], now=NOW)
    old, key = certificate(files.authority), (tmp_path / "ca.key").read_bytes()
    issuers, trusted = [], []
    for _ in steps(tmp_path):
        certify(tmp_path, ["a.example"], now=NOW)
        authorities = read_authorities(tmp_path)
        issuers.append(next(one for one in authorities if issued(files.certificate, one)))
        trusted.append(len(authorities))
    new = certificate(files.authority)
    assert trusted == [2, 2, 1]
    assert issuers == [old, new, new]
    assert new.subject != old.subject
    assert (tmp_path / "former-ca.key").read_bytes() == key
    assert stat.S_IMODE((tmp_path / "ca-2.key").stat().st_mode) == 0o600
    # And once more, from there.
    for _ in steps(tmp_path):
        certify(tmp_path, ["a.example"], now=NOW)
    assert issued(files.certificate, certificate(files.authority))
    assert sorted(path.name for path in tmp_path.glob("*ca*.key")) == ["ca-3.key", "former-ca-2.key", "former-ca.key"]


def issued(path, authority):
    try:
        certificate(path).verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature):
        return False
    return True


def test_a_step_out_of_turn_is_refused(tmp_path):
    certify(tmp_path, [], now=NOW)
    with pytest.raises(DocumentRefused, match="announce is the next step"):
        Rotation.of(tmp_path).take(Step.SWITCH, now=NOW)
    with pytest.raises(DocumentRefused, match="0 authorities"):
        Rotation.of(tmp_path / "nowhere")


def test_a_lost_authority_is_not_made_up_anew(tmp_path):
    certify(tmp_path, [], now=NOW)
    Rotation.of(tmp_path).take(Step.ANNOUNCE, now=NOW)
    pem = (tmp_path / "ca.pem").read_bytes()
    (tmp_path / "ca.pem").unlink()
    with pytest.raises(DocumentRefused, match=r"ca\.pem is gone"):
        certify(tmp_path, [], now=NOW)
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----")
    with pytest.raises(DocumentRefused, match="restore it from your backup"):
        certify(tmp_path, [], now=NOW)
    (tmp_path / "ca.pem").write_bytes(pem)
    (tmp_path / "ca.key").rename(tmp_path / "elsewhere")
    with pytest.raises(DocumentRefused, match="restore it from your backup"):
        certify(tmp_path, [], now=NOW)


@pytest.mark.parametrize("content", [b"", b"not a key"])
def test_a_broken_key_is_refused_and_kept(tmp_path, content):
    (tmp_path / "ca.key").touch(0o600)
    (tmp_path / "ca.key").write_bytes(content)
    with pytest.raises(DocumentRefused, match=r"ca\.key"):
        certify(tmp_path, [], now=NOW)
    assert (tmp_path / "ca.key").read_bytes() == content


@pytest.mark.parametrize("host", ["", "bücher.example"])
def test_a_host_that_no_certificate_can_name_is_refused(tmp_path, host):
    with pytest.raises(DocumentRefused, match="host"):
        certify(tmp_path, [host], now=NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_node_key_is_made_once(tmp_path):
    public = create_node_key(tmp_path / "node")
    private = serialization.load_ssh_private_key((tmp_path / "node").read_bytes(), None)
    assert serialization.load_ssh_public_key(public.read_bytes()) == private.public_key()
    with pytest.raises(DocumentRefused, match="not overwritten"):
        create_node_key(tmp_path / "node")
