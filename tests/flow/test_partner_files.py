"""A partner's own files, as ``fedgrade site up`` reads them: one line names what is wrong, and nothing is begun."""

import shutil
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner

from clients.commands import site as commands
from clients.configure import open_site
from clients.settings import read_site
from fedgrade.data import elpv
from fedgrade.errors import DocumentRefused, LedgerBroken, LedgerUnavailable
from fedgrade.federation.holdings import read_holdings
from fedgrade.privacy.accounting import printed, zcdp_epsilon
from fedgrade.trust.identity import SigningKey
from fedgrade.trust.ledger import read_ledger
from server.configure import compose_job
from server.local_federation import Terms, create_local_federation
from tests.server.few_photos import few

TERMS = Terms(modes=("local",), epsilon_limit=8.0, epsilon_per_job=4.0)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder, spec = tmp_path_factory.mktemp("partners"), compose_job([])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elpv, "site_manifests", few(elpv.site_manifests, recyclers=2))
        create_local_federation(
            folder / "federation", scale=spec.grading, data=spec.data, terms=TERMS, cache=folder / "cache"
        )
    return folder / "federation"


@pytest.fixture
def site_file(template, tmp_path):
    """``site.yaml`` of one partner, in a copy that a test may spoil."""
    shutil.copytree(template, tmp_path / "federation")
    return tmp_path / "federation" / "sites" / "recycler-a" / "site.yaml"


def changed(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def opened(site_file):
    site, charging = open_site(read_site(site_file))
    charging.close()
    return site


def test_a_partner_s_files_as_they_were_written_open(site_file):
    assert opened(site_file).answer(b"")
    assert (site_file.parent / "ledger.jsonl").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "old", "new", "line"),
    [
        ("site.yaml", "threads: ", "color: red\nthreads: ", "color: unknown key"),
        ("site.yaml", "site: recycler-a", "site: ../recycler", "a name is 1 to 63 of"),
        ("site.yaml", "declared_items: 50", "declared_items: 0", "site.cohorts: declared_items 0 must be at least 1"),
        ("site.yaml", "declared_items: 50", "declared_items: many", "declared_items"),
        ("site.yaml", "device: auto", "device: tpu", "device"),
        ("site.yaml", "photos: ", "photos: ~/photos  # ", "photos .*~/photos: no such folder; correct `photos`"),
        ("site.yaml", "site: recycler-a", "site: recycler-b", "the roster names another key"),
        ("site.yaml", "site: recycler-a", "site: recycler-z", "not on the roster"),
        ("site.yaml", "key: key.pem", "key: nowhere.pem", "key .*nowhere.pem: cannot be read"),
        ("site.yaml", "manifest: manifest.csv", "manifest: nowhere.csv", "manifest .*nowhere.csv: cannot be read"),
        ("site.yaml", "site: recycler-a", "site: !!python/object/apply:os.system [id]", "not plain YAML"),
        ("policy.yaml", "epsilon_limit: 8.0", "epsilon_limit: -1.0", "policy.epsilon_limit: -1.0 must be above 0"),
        ("policy.yaml", "epsilon_limit: 8.0", "epsilon_limits: 8.0", "epsilon_limit: "),
        ("policy.yaml", "maximum_rounds: 500", "maximum_rounds: yes", "maximum_rounds"),
    ],
)
def test_a_file_with_a_fault_is_one_line_that_names_it(site_file, name, old, new, line):
    changed(site_file.with_name(name), old, new)
    with pytest.raises(Exception, match=line) as refused:
        opened(site_file)
    assert type(refused.value).__module__ == "fedgrade.errors"
    assert "\n" not in str(refused.value)
    assert not (site_file.parent / "ledger.jsonl").exists()


def test_a_key_that_others_can_read_is_refused(site_file):
    (site_file.parent / "key.pem").chmod(0o644)
    with pytest.raises(DocumentRefused, match="chmod 600"):
        opened(site_file)


def test_a_new_key_needs_a_new_roster(site_file):
    (site_file.parent / "key.pem").unlink()
    SigningKey.generate().save(site_file.parent / "key.pem")
    with pytest.raises(DocumentRefused, match="send the coordinator your new one"):
        opened(site_file)


def test_a_site_file_of_many_bytes_is_not_read(site_file):
    with site_file.open("ab") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(DocumentRefused, match="the limit is 1048576"):
        read_site(site_file)


@pytest.fixture
def opened_site(site_file):
    """A site whose only cohort is under account."""
    site, charging = open_site(read_site(site_file))
    with charging:
        data = site._data
        held = read_holdings(data, grading=compose_job([]).grading, policy=site._rules.now(), secret=b"0" * 32)
        for holding in held.cohorts.values():
            charging.open_dataset(holding.dataset)
    return site_file


def corrected(site_file, *, cohort="2018", rho="1/500", reason="the clip was off", answer="y"):
    arguments = ["correct", str(site_file), "--cohort", cohort, "--side", "train", "--rho", rho, "--reason", reason]
    return CliRunner().invoke(commands, arguments, input=answer)


def test_a_partner_puts_on_record_what_was_spent_and_not_charged(opened_site):
    result = corrected(opened_site)
    assert result.exit_code == 0, result.output
    expected = printed(zcdp_epsilon(Fraction(1, 500), delta=Fraction(1, 10**5)))
    assert f"2018/train has spent epsilon {expected} in all" in result.output
    key = SigningKey.load(opened_site.parent / "key.pem").public
    last = list(read_ledger(opened_site.parent / "ledger.jsonl", key=key))[-1].body
    assert (last.account.cohort, last.rho, last.reason) == ("2018", Fraction(1, 500), "the clip was off")


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"answer": "n"}, "Aborted"),
        ({"rho": "-1/500"}, "must be above 0"),
        ({"rho": "1/0"}, "is no exact number"),
        ({"rho": "1e-9"}, "is no exact number"),
        ({"cohort": "1999"}, "is not under account; known: elpv-recycler-a/2018"),
        ({"reason": "two\nlines"}, "the reason must be 1 to 500 printable characters"),
    ],
    ids=str,
)
def test_a_correction_that_makes_no_sense_changes_nothing(opened_site, changes, line):
    before = (opened_site.parent / "ledger.jsonl").read_bytes()
    result = corrected(opened_site, **changes)
    assert result.exit_code != 0
    assert line in result.output + str(result.exception)
    assert (opened_site.parent / "ledger.jsonl").read_bytes() == before


def test_a_ledger_has_one_process(site_file):
    _, charging = open_site(read_site(site_file))
    with charging, pytest.raises(LedgerUnavailable, match="another process is writing it"):
        open_site(read_site(site_file))


def test_a_ledger_that_someone_touched_keeps_the_site_down(site_file):
    opened(site_file)
    changed(site_file.parent / "ledger.jsonl", '"payload":"e', '"payload":"f')
    with pytest.raises(LedgerBroken, match="entry 0"):
        opened(site_file)
