"""``fedgrade plan`` as people and scripts use it: what it prints is what its rooms say, and it touches nothing."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedgrade.cli import cli
from fedgrade.errors import DocumentRefused, JobRefused, LedgerBroken, PlanRefused
from fedgrade.federation.forecast import forecast
from fedgrade.job import plan_job
from fedgrade.privacy.accounting import printed
from fedgrade.trust.enrolment import JoinRequest, utc_text, write_request
from server.configure import compose_job
from server.coordinator_file import CoordinatorSettings
from server.coordinator_folder import CoordinatorFolder
from server.enrolment import create_coordinator, enrol
from server.plan_command import NONCE
from server.surroundings import read_surroundings
from tests.federation.small_federation import DECLARED, FIRST, NAMES, POLICY, SmallFederation, quick_noise, with_privacy

# The small federation's sites hold few items; the job must not ask for more.
SMALL = ("data.minimum_items=4", "privacy.rounds=2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A federation with one job behind it, with nothing in its folders but what a verifier gets."""
    federation = SmallFederation.create(tmp_path_factory.mktemp("plan") / "federation")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedgrade.federation.releases.discrete_gaussian", quick_noise)
        federation.run_in_process(federation.job(with_privacy(rounds=1)))
    return federation


@pytest.fixture
def furnished(tmp_path):
    """A federation that never ran, each site with its own settings and policy."""
    federation = SmallFederation.create(tmp_path / "federation")
    for name in NAMES:
        furnish(federation, name)
    return federation


def furnish(federation, name, **settings):
    written = {
        "policy": "policy.yaml",
        "ledger": "ledger.jsonl",
        "lineage": f"squares-{name}",
        "cohorts": {"2026": {"manifest": "manifest.csv", "declared_items": DECLARED}},
        **settings,
    }
    (federation.folder(name) / "site.yaml").write_text(yaml.safe_dump(written))
    write_policy(federation, name)


def write_policy(federation, name, **changes):
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(POLICY).items()}
    # The jobs planned here are the demo's, so these partners grade by its labels.
    plain["grades"] = list(compose_job([]).grading.labels)
    (federation.folder(name) / "policy.yaml").write_text(yaml.safe_dump({**plain, **changes}))


def planned(*arguments):
    return CliRunner().invoke(cli, ["plan", *map(str, arguments)])


def contents(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def rows(output, start):
    """The cells of every line that starts with ``start``."""
    return [line.split() for line in output.splitlines() if line.startswith(start)]


def test_without_a_federation_the_job_alone_is_told():
    result = planned("--sites", 4, "--items", 300, "privacy.rounds=20")
    assert result.exit_code == 0, result.output
    assert "4 assumed sites of 300 training items" in result.output
    assert "Nothing was started, sent or charged" in result.output
    spec = compose_job(["privacy.rounds=20"])
    declared = {f"site-{number}": 300 for number in range(1, 5)}
    (site, *_) = forecast(plan_job(spec, declared_items=declared, nonce=NONCE), standings={}).sites
    assert rows(result.output, "site-1")[0][2:6] == ["0.00", "4.00", "4.00", "unknown"]
    assert rows(result.output, "another partner")[0][2] == printed(site.observers.other_partner)
    assert rows(result.output, "training round")[0][2] == "20"
    assert "made-up table" in result.output
    assert "What the noise of 4 sites does" in result.output


def test_every_epsilon_of_a_federation_is_the_forecast_s_rounded_up(trained):
    result = planned("--federation", trained.root, *SMALL)
    assert result.exit_code == 0, result.output
    around = read_surroundings(trained.root)
    job = plan_job(compose_job(list(SMALL)), declared_items=around.declared_items, nonce=NONCE)
    for site in forecast(job, standings=around.standings).sites:
        for cells, account in zip(rows(result.output, site.site), (*site.training, *site.held_out), strict=True):
            expected = [printed(epsilon) for epsilon in (account.before, account.alone, account.after)]
            assert cells[2:6] == [*expected, "100.00"]
            assert float(cells[6]) <= account.left
    assert "No policy file here" in result.output


def test_planning_changes_no_file_and_needs_no_lock(trained):
    before = contents(trained.root)
    with trained.site():  # its node runs, and holds the ledger
        held = contents(trained.root)
        assert planned("--federation", trained.root, *SMALL).exit_code == 0
        assert contents(trained.root) == held
    assert contents(trained.root) == before


def test_a_federation_that_never_ran_is_planned_from_its_own_settings(furnished):
    result = planned("--federation", furnished.root, *SMALL)
    assert result.exit_code == 0, result.output
    assert "No rule and no budget known here stands in the way" in result.output
    assert not list(furnished.root.rglob("ledger.jsonl"))


@pytest.fixture
def enrolled_folder(tmp_path):
    """What `fedgrade coordinator init` makes, and nobody on its roster yet."""
    folder = CoordinatorFolder(root=tmp_path / "coordinator")
    settings = CoordinatorSettings(host="coordinator.example", public_port=1, admin_port=2, interface="127.0.0.1")
    create_coordinator(folder.root, settings, now=FIRST)
    return folder


def put_on_roster(folder, name, key, *, number, items):
    public = ec.derive_private_key(number, ec.SECP384R1()).public_key()
    node_key = public.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    wish = JoinRequest(site=name, key=key.public, node_key=node_key, declared_items=items, made=utc_text(FIRST))
    enrol(folder, write_request(wish, key), approve=lambda _: None, now=FIRST)


def test_partners_on_machines_of_their_own_are_planned_for_by_what_they_published(enrolled_folder, trained):
    refused = planned("--federation", enrolled_folder.root)
    assert isinstance(refused.exception, JobRefused)
    assert "nobody is enrolled" in str(refused.exception)
    for number, name in enumerate(NAMES, start=1):
        put_on_roster(enrolled_folder, name, trained.site_keys[name], number=number, items=40 * number)
    before = contents(enrolled_folder.root)
    result = planned("--federation", enrolled_folder.root, *SMALL)
    assert result.exit_code == 0, result.output
    assert f"the 3 sites that are enrolled in {enrolled_folder.root}" in result.output
    assert f"without a copy of their ledgers here: {', '.join(NAMES)}" in result.output
    assert f"No policy file here, so refusals by policy are not foreseen: {', '.join(NAMES)}" in result.output
    assert read_surroundings(enrolled_folder.root).declared_items == dict(zip(NAMES, (40, 80, 120), strict=True))
    assert contents(enrolled_folder.root) == before


def test_a_site_that_would_refuse_is_named_with_its_rule(furnished):
    write_policy(furnished, NAMES[1], epsilon_limit=3.0)
    result = planned("--federation", furnished.root, *SMALL, "aggregation.minimum_sites=2")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("Refused by")]
    assert line.startswith(f"Refused by {NAMES[1]}: account {NAMES[1]}/squares-{NAMES[1]}/2026/train: epsilon would")
    assert "the partner's ceiling is 3.00" in line
    assert "What the noise of 2 sites does" in result.output


def test_a_job_that_too_few_would_join_ends_in_a_status_that_scripts_see(furnished):
    for name in NAMES[:2]:
        write_policy(furnished, name, backbones=["resnet18"])
    result = planned("--federation", furnished.root, *SMALL)
    assert isinstance(result.exception, PlanRefused)
    assert "1 of 3 sites would take part; aggregation.minimum_sites is" in str(result.exception)
    assert f"Refused by {NAMES[0]}, {NAMES[1]}: job job: model.backbone" in result.output


def test_another_cohort_starts_with_nothing_spent(trained, tmp_path):
    result = planned("--federation", trained.root, *SMALL)
    assert rows(result.output, NAMES[0])[0][2] != "0.00"
    copy = SmallFederation.create(tmp_path / "federation")
    furnish(copy, NAMES[0])
    for path in contents(trained.root):
        target = copy.root / path.relative_to(trained.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    furnish(copy, NAMES[0], cohorts={"2027": {"manifest": "manifest.csv", "declared_items": DECLARED}})
    result = planned("--federation", copy.root, *SMALL)
    assert rows(result.output, NAMES[0])[0][2] == "0.00"
    assert rows(result.output, NAMES[1])[0][2] != "0.00"


def test_published_counts_are_what_metrics_are_simulated_on(trained, monkeypatch):
    spec = with_privacy(rounds=2)
    monkeypatch.setattr("server.plan_command.compose_job", lambda _: spec)
    result = planned("--federation", trained.root)
    assert result.exit_code == 0, result.output
    assert "the counts that job small published" in result.output


def test_the_plot_is_the_same_every_time_and_names_sites_and_ceiling(trained, tmp_path):
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    for path in (one, two):
        assert planned("--federation", trained.root, "--plot", path, *SMALL).exit_code == 0
    assert one.read_bytes() == two.read_bytes()
    words = "".join(ET.fromstring(one.read_bytes()).itertext())  # noqa: S314 - our own file
    assert "all 3 sites" in words
    assert "lifetime ceiling 100.00" in words
    assert b"var(" not in one.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]


def test_a_plot_without_a_federation_has_no_ceiling(tmp_path):
    path = tmp_path / "plan.svg"
    assert planned("--plot", path, "privacy.rounds=5").exit_code == 0
    words = "".join(ET.fromstring(path.read_bytes()).itertext())  # noqa: S314 - our own file
    assert "all 5 sites 4.00" in words
    assert "ceiling" not in words


def test_a_plot_that_cannot_be_written_is_one_line(tmp_path):
    result = planned("--plot", tmp_path / "absent" / "plan.svg")
    assert isinstance(result.exception, DocumentRefused)
    assert "cannot be written" in str(result.exception)


@pytest.mark.parametrize("arguments", [("--sites", "3"), ("--items", "100")])
def test_what_a_federation_knows_is_not_asked_twice(furnished, arguments):
    result = planned("--federation", furnished.root, *arguments)
    assert result.exit_code == 2
    assert "without --federation" in result.output


@pytest.mark.parametrize(
    ("spoil", "error", "line"),
    [
        (lambda root: (root / "roster.json").unlink(), DocumentRefused, "roster"),
        (lambda root: (root / "sites" / NAMES[0] / "site.yaml").write_text("[]"), DocumentRefused, "site file"),
        (lambda root: (root / "sites" / NAMES[0] / "site.yaml").write_text("a: &x 1"), DocumentRefused, "site file"),
        (
            lambda root: (root / "sites" / NAMES[0] / "site.yaml").write_text("policy: 3"),
            DocumentRefused,
            "site file.*policy",
        ),
        (lambda root: (root / "sites" / NAMES[0] / "policy.yaml").unlink(), DocumentRefused, "policy.*cannot be read"),
        (
            lambda root: (root / "sites" / NAMES[0] / "policy.yaml").write_text("modes: [local]"),
            DocumentRefused,
            "policy.*policy.yaml",
        ),
        (lambda root: (root / "sites" / NAMES[0] / "ledger.jsonl").write_bytes(b"{}\n"), LedgerBroken, "entry 0"),
    ],
)
def test_whatever_is_spoilt_is_refused_in_one_line(furnished, spoil, error, line):
    spoil(furnished.root)
    result = planned("--federation", furnished.root, *SMALL)
    assert isinstance(result.exception, error), result.output
    assert "\n" not in str(result.exception)
    with pytest.raises(error, match=line):
        raise result.exception


def test_a_torn_ledger_is_refused(trained, tmp_path):
    copy = SmallFederation.create(tmp_path / "federation")
    (copy.root / "roster.json").write_bytes((trained.root / "roster.json").read_bytes())
    copy.ledger(NAMES[0]).write_bytes(trained.ledger(NAMES[0]).read_bytes()[:-7])
    result = planned("--federation", copy.root, *SMALL)
    assert isinstance(result.exception, LedgerBroken)
    assert "torn" in str(result.exception)


def test_sites_of_which_nothing_is_known_are_left_out_and_named(furnished):
    (furnished.folder(NAMES[2]) / "site.yaml").unlink()
    result = planned("--federation", furnished.root, *SMALL, "aggregation.minimum_sites=2")
    assert result.exit_code == 0, result.output
    assert f"left out, with neither site.yaml nor a charged ledger here: {NAMES[2]}" in result.output
    assert not rows(result.output, NAMES[2])


def test_a_job_that_cannot_be_planned_is_refused_as_run_would_refuse_it(furnished):
    result = planned("--federation", furnished.root)  # the sites have fewer items than data.minimum_items
    assert isinstance(result.exception, JobRefused)
    assert "data.minimum_items" in str(result.exception)


def test_an_installed_command_answers_and_needs_neither_torch_nor_flower():
    script = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'flwr', 'opacus', 'timm', 'opendp', 'ray'):\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "from fedgrade.cli import main\n"
        "sys.argv = ['fedgrade', 'plan', *sys.argv[1:]]\n"
        "main()\n"
    )
    root = Path(__file__).parents[2]
    done, refused = (
        subprocess.run(
            [sys.executable, "-c", script, *arguments],
            capture_output=True,
            text=True,
            check=False,
            cwd=root,
            timeout=300,
        )
        for arguments in (["privacy.rounds=3"], ["privacy.rounds=3", "aggregation.minimum_sites=6"])
    )
    assert done.returncode == 0, done.stderr
    assert "Epsilon of one item" in done.stdout
    assert refused.returncode == 1
    assert refused.stderr == "fedgrade: aggregation.minimum_sites: 6 exceeds the 5 participants\n"
