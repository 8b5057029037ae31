import os
import resource
import subprocess
import sys
import textwrap

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.errors import DocumentRefused, SignatureRefused
from fedgrade.trust.canonical import encode
from fedgrade.trust.identity import PublicKey, Roster, SigningKey, SiteId, read_roster, site_id

# RFC 8032, section 7.1, test 3.
RFC_SECRET = bytes.fromhex("c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7")
RFC_PUBLIC = "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025"
RFC_MESSAGE = bytes.fromhex("af82")
RFC_SIGNATURE = bytes.fromhex(
    "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac"
    "18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a"
)


def test_signatures_are_those_of_the_specification():
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(RFC_SECRET))
    assert key.public.hexadecimal == RFC_PUBLIC
    assert key.sign(RFC_MESSAGE) == RFC_SIGNATURE
    key.public.verify(RFC_SIGNATURE, RFC_MESSAGE)


@given(st.integers(0, 511))
def test_a_signature_with_one_bit_changed_is_refused(bit):
    altered = bytearray(RFC_SIGNATURE)
    altered[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureRefused):
        PublicKey(hexadecimal=RFC_PUBLIC).verify(bytes(altered), RFC_MESSAGE)


@pytest.mark.parametrize("signature", [b"", RFC_SIGNATURE[:63], RFC_SIGNATURE + b"\0", bytes(64)])
def test_a_signature_of_another_length_or_of_nothing_is_refused(signature):
    with pytest.raises(SignatureRefused):
        PublicKey(hexadecimal=RFC_PUBLIC).verify(signature, RFC_MESSAGE)


@pytest.mark.parametrize("text", ["", "ab", "g" * 64, RFC_PUBLIC.upper(), RFC_PUBLIC + "\n", " " + RFC_PUBLIC[1:]])
def test_a_public_key_has_one_spelling(text):
    with pytest.raises(DocumentRefused, match="64 lower-case hexadecimal digits"):
        PublicKey(hexadecimal=text)


def test_a_saved_key_is_the_same_key_and_only_its_owner_can_read_it(tmp_path):
    key, path = SigningKey.generate(), tmp_path / "site.key"
    before = os.umask(0)
    try:
        key.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).public == key.public


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "site.key"
    SigningKey.generate().save(path)
    standing = path.read_bytes()
    with pytest.raises(DocumentRefused, match="exists already"):
        SigningKey.generate().save(path)
    assert path.read_bytes() == standing


def test_a_link_that_leads_elsewhere_is_not_written_through(tmp_path):
    (tmp_path / "site.key").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DocumentRefused, match="exists already"):
        SigningKey.generate().save(tmp_path / "site.key")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601])
def test_a_key_that_others_could_touch_is_not_used(tmp_path, mode):
    path = tmp_path / "site.key"
    SigningKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(DocumentRefused, match="chmod 600"):
        SigningKey.load(path)


def test_a_key_file_that_is_no_key_is_refused_in_one_line(tmp_path):
    elliptic = ec.generate_private_key(ec.SECP384R1())
    with_passphrase = serialization.BestAvailableEncryption(b"secret")
    pem, pkcs8, plain = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    contents = {
        "not an unencrypted PEM": [
            b"",
            b"\xff\xfe",
            b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
            Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, with_passphrase),
        ],
        "an Ed25519 key is needed, found EC": [elliptic.private_bytes(pem, pkcs8, plain)],
    }
    for fault, files in contents.items():
        for number, content in enumerate(files):
            path = tmp_path / f"{len(fault)}-{number}.key"
            path.write_bytes(content)
            path.chmod(0o600)
            with pytest.raises(DocumentRefused, match=fault):
                SigningKey.load(path)


def test_a_missing_key_or_folder_is_named(tmp_path):
    with pytest.raises(DocumentRefused, match="No such file"):
        SigningKey.load(tmp_path / "none.key")
    with pytest.raises(DocumentRefused, match="cannot be written"):
        SigningKey.generate().save(tmp_path / "none" / "site.key")
    with pytest.raises(DocumentRefused, match="cannot be read"):
        SigningKey.load(tmp_path)


def test_a_full_disk_leaves_no_half_a_key(tmp_path):
    program = """
        import sys, resource
        from pathlib import Path
        from fedgrade.errors import DocumentRefused
        from fedgrade.trust.identity import SigningKey
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
        try:
            SigningKey.generate().save(Path(sys.argv[1]))
        except DocumentRefused as error:
            print(error)
    """
    path = tmp_path / "site.key"
    command = [sys.executable, "-c", textwrap.dedent(program), path]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "cannot be written (File too large)" in shown
    assert not path.exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 50


def test_a_key_prints_as_its_public_half_only():
    key = SigningKey(Ed25519PrivateKey.from_private_bytes(RFC_SECRET))
    assert repr(key) == "SigningKey(public=fc51cd8e6218a1a3…)"
    assert RFC_SECRET.hex()[:16] not in repr(vars(key))


@pytest.mark.parametrize("name", ["a", "site-1", "0", "a" * 63, "a--b"])
def test_a_site_name_is_a_label(name):
    assert site_id(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a" * 64, "a.b", "a/b", "../a", "a\n", "a b", "é", "a_b"])
def test_other_names_are_refused(name):
    with pytest.raises(DocumentRefused, match="a name is 1 to 63"):
        site_id(name)


def some_roster(count=2):
    sites = {SiteId(f"site-{number}"): SigningKey.generate().public for number in range(count)}
    return Roster(coordinator=SigningKey.generate().public, sites=sites)


def test_a_roster_survives_its_file(tmp_path):
    roster = some_roster()
    (tmp_path / "roster.json").write_bytes(encode(roster))
    assert read_roster(tmp_path / "roster.json") == roster


def test_one_key_cannot_stand_for_two_identities():
    roster = some_roster()
    key = roster.sites[SiteId("site-0")]
    for twice in ({"coordinator": key}, {"sites": {**roster.sites, SiteId("site-9"): key}}):
        with pytest.raises(DocumentRefused, match="one key stands for two identities"):
            Roster(**{**vars(roster), **twice})


def test_a_site_that_is_not_on_the_roster_has_no_key():
    with pytest.raises(SignatureRefused, match="'stranger' is not on the roster"):
        some_roster().key_of(SiteId("stranger"))


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"{}", "coordinator"),
        (b'{"coordinator":{"hexadecimal":"00"},"sites":{}}', "64 lower-case"),
        (b'{"coordinator":{"hexadecimal":"%s"},"sites":{"../x":{"hexadecimal":"%s"}}}', "a name is 1 to 63"),
        (b"\x80", "not strict JSON"),
    ],
)
def test_a_malformed_roster_is_refused(tmp_path, content, fault):
    path = tmp_path / "roster.json"
    path.write_bytes(content.replace(b"%s", b"a" * 64, 1).replace(b"%s", b"b" * 64))
    with pytest.raises(DocumentRefused, match=fault):
        read_roster(path)


def test_a_missing_roster_is_named(tmp_path):
    with pytest.raises(DocumentRefused, match="cannot be read"):
        read_roster(tmp_path / "none.json")
