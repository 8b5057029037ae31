"""What a partner's operator types about jobs that wait for it."""

from dataclasses import replace

import pytest
from click.testing import CliRunner

from clients.commands import site
from clients.settings import read_site
from clients.templates import PolicyValues, SiteValues, policy_yaml, site_yaml
from fedgrade.errors import JobRefused, SiteWaits
from fedgrade.federation.approvals import Approvals
from fedgrade.trust.envelope import seal
from tests.federation.small_federation import NAMES, POLICY, SPEC, SmallFederation

HOSTILE = "panels\x1b[2J\nand more"


@pytest.fixture
def federation(tmp_path):
    return SmallFederation.create(tmp_path / "federation")


@pytest.fixture
def site_file(federation):
    folder = federation.folder(NAMES[0])
    values = SiteValues(
        site=NAMES[0], photos="photos", lineage="squares", cohort="2026", manifest="manifest.csv", declared_items=8,
        photos_per_item=1, roster="../../roster.json",
    )  # fmt: skip
    (folder / "site.yaml").write_text(site_yaml(values))
    policy = PolicyValues(
        modes=("local",), epsilon_limit=100.0, epsilon_per_job=40.0, backbones=POLICY.backbones, grades=POLICY.grades,
        minimum_participants=2, minimum_items=4,
    )  # fmt: skip
    (folder / "policy.yaml").write_text(policy_yaml(policy))
    return folder / "site.yaml"


def shown(federation, site_file, job):
    """A coordinator showed ``job``, and nobody has decided."""
    approvals = Approvals(read_site(site_file).approvals)
    with pytest.raises(SiteWaits):
        approvals.require(job, seal(job, federation.coordinator_key).decode())
    return approvals


def typed(*arguments, answer=None):
    return CliRunner().invoke(site, [str(argument) for argument in arguments], input=answer)


def test_a_job_is_described_before_it_is_approved(federation, site_file):
    job = federation.job()
    approvals = shown(federation, site_file, job)
    told = typed("jobs", site_file)
    assert job.digest[:16] in told.output
    assert "waiting" in told.output

    done = typed("approve", site_file, job.digest[:16], answer="y\n")
    assert done.exit_code == 0, done.output
    for words in ("purpose       grade square as A, B, C", "privacy mode local, 2 rounds", "everyone else together",
                  "2026 training", "2026 held-out", "0.00 spent, ", "ceiling 100.00"):  # fmt: skip
        assert words in done.output
    approvals.require(job, "")


def test_no_is_no_and_leaves_the_question_open(federation, site_file):
    job = federation.job()
    approvals = shown(federation, site_file, job)
    assert typed("approve", site_file, job.digest, answer="n\n").exit_code == 1
    (asked,) = approvals.asked(coordinator=federation.roster.coordinator)
    assert asked.decision == "waiting"
    assert typed("decline", site_file, job.digest).exit_code == 0
    assert "declined" in typed("jobs", site_file).output


def test_a_job_that_would_be_refused_says_so_first(federation, site_file):
    policy = site_file.with_name("policy.yaml")
    policy.write_text(policy.read_text().replace("minimum_participants: 2", "minimum_participants: 4"))
    job = federation.job()
    shown(federation, site_file, job)
    assert "would refuse it all the same" in typed("approve", site_file, job.digest, "--yes").output


def test_a_coordinator_s_words_steer_no_terminal(federation, site_file):
    spec = replace(SPEC, data=replace(SPEC.data, asset_type=HOSTILE))
    job = federation.job(spec)
    shown(federation, site_file, job)
    for told in (typed("approve", site_file, job.digest, "--yes"), typed("jobs", site_file)):
        assert "\x1b" not in told.output
        assert "\nand more" not in told.output


@pytest.mark.parametrize("part", ["", "zz", "0000"])
def test_an_unknown_or_ambiguous_job_is_named(federation, site_file, part):
    shown(federation, site_file, federation.job())
    failed = typed("approve", site_file, part, "--yes")
    assert isinstance(failed.exception, JobRefused)
    assert "give more of the digest" in str(failed.exception)


def test_with_nothing_asked_there_is_nothing_to_list(site_file):
    assert "no job was shown" in typed("jobs", site_file).output
