"""``fedgrade budget``: its numbers are the verifier's, and what it says of one more job is what then happens."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.cli import cli
from fedgrade.cli.budget import BAR_WIDTH, bar, left, waste
from fedgrade.errors import DocumentRefused, LedgerBroken
from fedgrade.federation.messages import Refusal
from fedgrade.federation.verification import verify_federation
from fedgrade.privacy.accounting import printed
from fedgrade.trust.canonical import encode
from fedgrade.trust.identity import Roster, SigningKey
from tests.federation.small_federation import NAMES, POLICY, SmallFederation, quick_noise, with_privacy
from tests.report.federation_folder import Story, Workshop, play, write_federation

ONE_ROUND = with_privacy(rounds=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)


@pytest.fixture
def trained(tmp_path):
    federation = SmallFederation.create(tmp_path / "federation")
    federation.run_in_process(federation.job(ONE_ROUND))
    return federation


@pytest.fixture(scope="module")
def troubled(tmp_path_factory):
    """One attempt was aborted, one reply lost, and one site fell silent for good."""
    folder = tmp_path_factory.mktemp("budget") / "federation"
    story = Story(aborted=frozenset({("gdansk", 4)}), repeated=frozenset({("turin", 9)}))
    write_federation(folder, story)
    return folder


def listed(*arguments):
    return CliRunner().invoke(cli, ["budget", *map(str, arguments)])


def row(output, account):
    """The cells of one account's row."""
    (line,) = [line for line in output.splitlines() if line.startswith(account)]
    return line.split()


def test_every_account_is_listed_with_the_verifier_s_own_numbers(trained):
    result = listed(trained.root)
    assert result.exit_code == 0, result.output
    for name, site in verify_federation(trained.root).sites.items():
        for key, account in site.accounts.items():
            cells = row(result.output, f"{name}/squares-{name}/2026/{key.partition}")
            assert cells[1] == printed(account.epsilon)
            assert cells[3] == "100.00"
            assert float(cells[4]) + float(cells[1]) == pytest.approx(100.0)
            assert cells[5:9] == ["1e-05", "1", "2" if key.partition == "train" else "1", "0"]
    assert "came from the folder itself" in result.output


@pytest.mark.parametrize("limit", [100.0, 50.0])
def test_what_one_more_job_would_do_is_what_it_does(trained, limit):
    policy = replace(POLICY, epsilon_limit=limit)
    with trained.site(policy=policy) as site:  # the partner may lower its ceiling; that is on the record
        tiny = trained.job(with_privacy(rounds=1, target_epsilon=1.0, evaluation_epsilon=1.0), nonce="tiny")
        site.answer(trained.admission(tiny))
    foretold = row(listed(trained.root).output, f"{NAMES[0]}/squares-{NAMES[0]}/2026/train")[-2:]
    again = trained.job(ONE_ROUND, nonce="again")
    with trained.site(policy=policy) as site:
        body = trained.opened(site.answer(trained.admission(again))).document.body
    if limit == 50.0:
        assert isinstance(body, Refusal)
        assert body.code == "budget"
        assert foretold[1] == "refused"
        assert f"epsilon would reach {foretold[0].rstrip(',')}" in body.reason
    else:
        trained.run_in_process(again)
        proof = verify_federation(trained.root).sites[NAMES[0]]
        (account,) = [one for key, one in proof.accounts.items() if key.partition == "train"]
        assert foretold == [f"{printed(account.epsilon)},", "fits"]


def test_charges_that_bought_nothing_are_counted_with_their_reason(troubled):
    output = listed(troubled).output
    assert "1 (1 aborted)" in output
    assert "1 (1 asked again)" in output
    assert row(output, "gdansk/intake/2026-spring/train")[7] == "22"
    assert row(output, "bremen/intake/2026-spring/train")[7:9] == ["21", "0"]


def test_a_charge_counts_once_and_the_last_committed_attempt_bought_something(troubled):
    proof = verify_federation(troubled)
    for site in proof.sites.values():
        charges = list(site.charges.values())
        expected = {"gdansk": "1 (1 aborted)", "turin": "1 (1 asked again)"}
        assert waste(charges) == expected.get(site.site, "0")
        assert waste([replace(charge, outcome="open") for charge in charges]).startswith(f"{len(charges)} (")
        assert waste([]) == "0"


def test_a_partner_s_own_ledger_alone_says_the_same_under_any_file_name(trained, tmp_path):
    moved = tmp_path / "copy of my ledger"
    moved.write_bytes(trained.ledger(NAMES[1]).read_bytes())
    whole, alone = listed(trained.root), listed(moved, "--roster", trained.root / "roster.json")
    assert alone.exit_code == 0, alone.output
    for partition in ("train", "test"):
        account = f"{NAMES[1]}/squares-{NAMES[1]}/2026/{partition}"
        assert row(alone.output, account) == row(whole.output, account)
    assert "came from the folder itself" not in alone.output


def test_several_paths_are_listed_one_after_the_other(trained, troubled):
    result = listed(trained.root, troubled)
    assert result.exit_code == 0, result.output
    assert result.output.count("Privacy budgets of") == 2


def test_a_ledger_that_is_held_can_be_read_and_is_not_changed(trained):
    with trained.site():
        before = hashlib.sha256(trained.ledger(NAMES[0]).read_bytes()).hexdigest()
        assert listed(trained.ledger(NAMES[0]), "--roster", trained.root / "roster.json").exit_code == 0
        assert hashlib.sha256(trained.ledger(NAMES[0]).read_bytes()).hexdigest() == before


def test_a_ledger_without_a_charge_says_so(tmp_path):
    federation = SmallFederation.create(tmp_path / "federation")
    with federation.site():
        pass
    result = listed(federation.ledger(NAMES[0]), "--roster", federation.root / "roster.json")
    assert result.exit_code == 0, result.output
    assert "nothing was charged yet" in result.output


def test_a_ledger_alone_needs_a_roster(trained):
    result = listed(trained.ledger(NAMES[0]))
    assert isinstance(result.exception, DocumentRefused)
    assert "give --roster" in str(result.exception)


def test_a_ledger_of_a_stranger_is_refused(trained, tmp_path):
    keys = {name: SigningKey.generate().public for name in NAMES}
    roster = tmp_path / "roster.json"
    roster.write_bytes(encode(Roster(coordinator=SigningKey.generate().public, sites=keys)))
    result = listed(trained.ledger(NAMES[0]), "--roster", roster)
    assert isinstance(result.exception, DocumentRefused)
    assert "signed by no site of the roster" in str(result.exception)


@pytest.mark.parametrize("spoil", [lambda raw: raw[:-9], lambda raw: raw.replace(b"payload", b"paylaod", 1)])
def test_a_spoilt_ledger_is_refused(trained, spoil):
    path = trained.ledger(NAMES[2])
    path.write_bytes(spoil(path.read_bytes()))
    for result in (listed(trained.root), listed(path, "--roster", trained.root / "roster.json")):
        assert isinstance(result.exception, LedgerBroken | DocumentRefused)
        assert "\n" not in str(result.exception)


def test_a_name_that_a_partner_chose_cannot_steer_the_terminal(tmp_path):
    workshop = Workshop(folder=tmp_path / "federation", cohort="[red]\x1b[2J\n" + "x" * 200)
    try:
        play(Story(stop_after=2, published=False), workshop)
    finally:
        workshop.close()
    output = listed(workshop.folder).output
    assert "\x1b" not in output
    assert "bremen/intake/[red]?[2J?xxx" in output
    assert "x" * 60 not in output


@given(
    st.fractions(min_value=Fraction(1, 1000), max_value=1000, max_denominator=10**6),
    st.floats(0.0, 1.2, allow_nan=False),
)
def test_used_and_left_together_never_pass_the_ceiling(ceiling, share):
    used = float(ceiling) * share
    remaining = Fraction(left(used, ceiling=ceiling))
    assert remaining >= 0
    if remaining:
        assert Fraction(printed(used)) + remaining <= ceiling


@given(st.floats(0.0, 50.0), st.floats(0.0, 50.0), st.floats(0.01, 40.0))
def test_a_bar_is_as_long_as_its_ceiling_and_marks_what_passes_it(used, more, ceiling):
    drawn = bar(used, used + more, ceiling=ceiling)
    assert len(drawn.removesuffix("→")) == BAR_WIDTH
    assert drawn.endswith("→") == (used + more > ceiling)
    assert drawn == "".join(sorted(drawn, key="█▒·→".index))


def test_an_infinite_epsilon_fills_the_bar():
    assert bar(0.0, float("inf"), ceiling=8.0) == "▒" * BAR_WIDTH + "→"
    assert left(float("inf"), ceiling=Fraction(8)) == "0.00"


def test_a_compliance_laptop_lists_budgets_without_torch_or_flower(troubled):
    script = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'flwr', 'opacus', 'timm', 'opendp', 'hydra', 'ray'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from fedgrade.cli import main\n"
        "sys.argv = ['fedgrade', 'budget', *sys.argv[1:]]\n"
        "main()\n"
    )
    root = Path(__file__).parents[1]
    done, refused = (
        subprocess.run(
            [sys.executable, "-c", script, path], capture_output=True, text=True, check=False, cwd=root, timeout=300
        )
        for path in (troubled, troubled / "sites" / "turin" / "ledger.jsonl")
    )
    assert done.returncode == 0, done.stderr
    assert "rotterdam/intake/2026-spring/test" in done.stdout
    assert refused.returncode == 1
    assert refused.stderr.startswith("fedgrade: ")
    assert refused.stderr.count("\n") == 1
