"""The report on folders that the real ledgers wrote: what it says, what it refuses, and that it repeats."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from html.parser import HTMLParser

import pytest

from fedgrade.errors import DocumentRefused, LedgerBroken, SignatureRefused
from fedgrade.federation import releases
from fedgrade.federation.verification import verify_federation
from fedgrade.grading import GradeScale
from fedgrade.privacy.accounting import printed, zcdp_epsilon
from fedgrade.privacy.plan import LocalSgdSpec
from fedgrade.report import privacy_report, write_report
from fedgrade.trust.canonical import digest as digest_of
from fedgrade.trust.identity import SigningKey, read_roster
from fedgrade.trust.ledger import roots_at
from tests.federation.small_federation import DISTRIBUTED, POLICY, SmallFederation, quick_noise

NOW = datetime(2026, 3, 3, 12, 0, tzinfo=UTC)
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """The page as a reader has it: marked figures, links, headings, all its words, and whether tags close."""

    def __init__(self, html):
        super().__init__()
        self.figures, self.tags, self.attributes, self.words = {}, [], [], []
        self._open = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self._open, tag
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if any(tag == "style" for tag, _ in self._open):
            return
        self.words.append(data)
        for name, value in self._open[-1][1].items() if self._open else ():
            if name.startswith("data-") and name != "data-label":
                self.figures[name.removeprefix("data-"), value] = self.figures.get((name, value), "") + data.strip()

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def report(folder, **terms):
    return privacy_report(verify_federation(folder), generated=NOW, **terms)


@pytest.fixture(scope="session")
def troubled_page(troubled_folder):
    return report(troubled_folder)


def folder_of(federations, tmp_path, *stories, **terms):
    federations.write_federation(tmp_path / "federation", *stories, **terms)
    return tmp_path / "federation"


def test_the_same_ledgers_give_the_same_bytes(troubled_folder, troubled_page):
    assert report(troubled_folder) == troubled_page


def test_every_headline_number_is_the_proofs_own(troubled_folder, troubled_page):
    proof, page = verify_federation(troubled_folder), Page(troubled_page)
    (job,) = proof.jobs.values()
    for name in ("coordinator", "other_partner", "model_holder", "full_collusion"):
        worst = max(getattr(epsilons, name) for epsilons in job.observers.values())
        assert page.figures["observer", name] == printed(worst)
    accounts = [account for site in proof.sites.values() for account in site.accounts.values()]
    assert f"≤ {printed(max(account.epsilon for account in accounts))}" in page.text
    metrics = job.release.release.metrics
    assert page.figures["metric", "kappa"] == f"{metrics.quadratic_weighted_kappa:.3f}"
    assert page.figures["metric", "accuracy"] == f"{100 * metrics.accuracy:.1f} %"
    assert page.figures["metric", "miss"] == f"{100 * metrics.critical_miss_rate:.1f} %"


def test_an_epsilon_is_recomputed_from_the_charges_by_hand(troubled_folder, troubled_page):
    proof, page = verify_federation(troubled_folder), Page(troubled_page)
    (job,) = proof.jobs.values()
    plan = job.job.plan
    rho = Fraction(plan.centre.sensitivity**2, 2 * plan.centre.scale**2)
    rho += 21 * Fraction(plan.train.sensitivity**2, 2 * plan.train.scale**2)  # 20 rounds and one attempt for nothing
    assert page.figures["observer", "full_collusion"] == printed(zcdp_epsilon(rho, delta=plan.delta))


def test_charges_that_bought_nothing_are_counted(troubled_page):
    assert re.search(r"gdansk 23 22 0 1 0", Page(troubled_page).text)
    assert re.search(r"turin 23 22 1 0 0", Page(troubled_page).text)
    assert re.search(r"limerick 21 21 0 0 0", Page(troubled_page).text)


def test_the_noise_of_the_counts_is_the_sum_over_sites_that_answered(troubled_folder, troubled_page):
    (job,) = verify_federation(troubled_folder).jobs.values()
    deviation = job.job.plan.evaluate.scale / job.job.plan.evaluate.sensitivity * 5**0.5
    assert f"a standard deviation of {deviation:.1f} items per cell" in Page(troubled_page).text


def test_fingerprints_are_printed_in_full(troubled_folder, troubled_page):
    page, roster = Page(troubled_page), read_roster(troubled_folder / "roster.json")
    assert page.figures["key", "coordinator"].replace(" ", "") == roster.coordinator.key_id
    for site, key in roster.sites.items():
        assert page.figures["key", site].replace(" ", "") == key.key_id
    proof = verify_federation(troubled_folder)
    squeezed = troubled_page.replace(" ", "")
    for digest in (*(site.head for site in proof.sites.values()), *proof.jobs, *(
        job.release.digest for job in proof.jobs.values()
    )):  # fmt: skip
        assert digest in squeezed


def test_every_ledger_is_named_by_its_head_the_coordinators_too(troubled_folder, troubled_page):
    proof, text = verify_federation(troubled_folder), Page(troubled_page).text
    sites = {name: (site.head, site.entries) for name, site in proof.sites.items()}
    for name, (head, entries) in {"coordinator": (proof.coordinator_head, proof.coordinator_entries), **sites}.items():
        row = text[text.index(f" {name} ", text.index("Ledger head")) :].replace(" ", "")
        assert f"{head}after{entries}entries" in row[:300]
    assert proof.coordinator_entries + sum(entries for _, entries in sites.values()) == proof.entries


def test_roots_and_heads_of_the_proof_are_those_of_the_lines_on_disk(troubled_folder):
    proof = verify_federation(troubled_folder)
    found = {f"sites/{name}": (site.head, site.entries, site.root) for name, site in proof.sites.items()}
    found["coordinator"] = (proof.coordinator_head, proof.coordinator_entries, proof.coordinator_root)
    for folder, (head, entries, root) in found.items():
        path = troubled_folder / folder / "ledger.jsonl"
        lines = path.read_bytes().splitlines()
        assert (head, entries) == (digest_of(lines[-1]), len(lines))
        assert roots_at(path, sizes={entries}) == {entries: root}


def test_the_page_counts_the_heads_that_the_other_side_saw(troubled_folder, troubled_page):
    proof = verify_federation(troubled_folder)
    receipts = sum(len(closed.receipts) for job in proof.jobs.values() for closed in job.rounds)
    shown = sum(len(site.checkpoints) for site in proof.sites.values())
    assert proof.witnessed == receipts + shown > 0
    assert f"{proof.witnessed:,} ledger heads countersigned by the other side" in Page(troubled_page).text


def test_the_page_says_where_the_roster_came_from(troubled_folder, troubled_page):
    assert "found in the same folder as the ledgers" in Page(troubled_page).text
    brought = Page(report(troubled_folder, roster_source="verifier")).text
    assert "found in the same folder" not in brought
    assert "The verifier brought the roster of keys along" in brought


def test_the_page_is_one_file_that_loads_and_runs_nothing(troubled_page):
    page = Page(troubled_page)
    assert not {"script", "link", "img", "iframe", "object", "embed", "form"} & set(page.tags)
    assert all(not name.startswith("on") for name, _ in page.attributes)
    links = [value for name, value in page.attributes if name in {"href", "src", "xlink:href"}]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in troubled_page
    assert not re.search(r"url\((?!#)", troubled_page)
    assert "default-src 'none'" in troubled_page


def test_the_page_never_overclaims(troubled_page):
    words = Page(troubled_page).text.lower()
    for claim in ("anonym", "verified epsilon", "verified ε", "guarantees that", "fully private", "unbreakable"):
        assert claim not in words
    assert "evidence against" in words


def test_every_number_has_a_place_in_the_page_that_a_screen_reader_finds(troubled_page):
    page = Page(troubled_page)
    scopes = [value for name, value in page.attributes if name == "scope"]
    assert {"row", "col"} <= set(scopes)
    assert page.tags.count("h1") == 1
    assert page.tags.count("svg") == 4
    assert page.tags.count("desc") == 4
    names = [value for name, value in page.attributes if name == "id"]
    assert len(set(names)) == len(names)


def test_two_jobs_share_one_budget_and_are_both_told(federations, tmp_path):
    stories = (federations.Story(name="first"), federations.Story(name="second", sites=federations.SITES[:3]))
    folder = folder_of(federations, tmp_path, *stories)
    proof, page = verify_federation(folder), Page(report(folder))
    assert len(proof.jobs) == 2
    worst = max(account.epsilon for site in proof.sites.values() for account in site.accounts.values())
    assert worst > max(epsilons.full_collusion for job in proof.jobs.values() for epsilons in job.observers.values())
    assert f"≤ {printed(worst)}" in page.text
    assert "first , second" in page.text


def test_a_secure_sum_hides_uploads_from_the_coordinator_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(releases, "discrete_gaussian", quick_noise)
    federation = SmallFederation.create(tmp_path / "federation")
    job = federation.job(DISTRIBUTED)
    federation.run_in_process(job, policy=replace(POLICY, modes=("distributed",), epsilon_per_job=60.0))
    page = Page(report(federation.root))
    assert "Single uploads reach it under masks alone" in page.text
    assert "under masks: the coordinator reads the total alone" in page.text
    assert f"{job.plan.rounds + 2} secure sums: every partner that is counted" in page.text
    assert page.figures["observer", "coordinator"] == page.figures["observer", "model_holder"]
    assert float(page.figures["observer", "full_collusion"]) > float(page.figures["observer", "coordinator"])
    assert "floor_epsilon 60.00" in page.text
    assert "aggregation secure sum" in page.text


# As many items each: one plan of steps by Poisson sampling, which takes seconds to solve, does for both.
ALIKE = ("bremen", "gdansk")


def test_floating_point_noise_is_owned_up_to(federations, tmp_path):
    spec = LocalSgdSpec(
        target_epsilon=3.0, delta=1e-5, evaluation_epsilon=1.0, centre_share=0.2, rounds=2, max_grad_norm=1.0,
        sampling_rate=0.125, local_steps=4, learning_rate=0.5,
    )  # fmt: skip
    folder = folder_of(
        federations, tmp_path, federations.Story(privacy=spec, sites=ALIKE), sites=ALIKE, composition="mixed"
    )
    page = Page(report(folder))
    assert "DP-SGD steps carry floating-point noise" in page.text
    assert "from ( ε , δ ) alone [1] for DP-SGD" in page.text
    assert "8 DP-SGD steps" in page.text
    assert "No reduction is claimed" in page.text
    assert "grows at least in proportion" in page.text


def test_a_job_without_a_release_says_so(federations, tmp_path):
    folder = folder_of(federations, tmp_path, federations.Story(stop_after=4, published=False))
    page = Page(report(folder))
    assert "No model has been published" in page.text
    assert "nothing published" in page.text


def test_ledgers_that_have_charged_nothing_make_a_page_that_says_so(federations, tmp_path):
    folder = folder_of(federations, tmp_path, federations.Story(stop_after=0, published=False))
    page = Page(report(folder))
    assert "no account in these ledgers has spent any privacy" in page.text
    assert "svg" not in page.tags
    assert "1 job admitted by partners never closed a round" in page.text


def test_a_participant_whose_ledger_is_missing_is_named(federations, tmp_path):
    folder = folder_of(federations, tmp_path)
    shutil.rmtree(folder / "sites" / "turin")
    page = Page(report(folder))
    assert "Not checked: the ledgers of turin" in page.text
    assert "turin" not in [site for kind, site in page.figures if kind == "aborted"]


def test_names_chosen_by_others_cannot_break_out_of_the_page(federations, tmp_path):
    cost = tuple(tuple(float(abs(a - b)) for b in range(4)) for a in range(4))
    evil = ("</style><script>alert(1)</script>", '$x^2$ & "quoted"', "\u202egrade\x00", "回收 " * 40)
    scale = GradeScale(name="evil", labels=evil, critical=(evil[0],), cost=cost)
    stories = (federations.Story(scale=scale),)
    html = report(folder_of(federations, tmp_path, *stories, cohort="<b>&amp;$\\frac{</svg>"))
    page = Page(html)
    assert "script" not in page.tags
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "</style><script>alert(1)</script>" in page.text


def test_a_scale_without_critical_grades_reports_none(federations, tmp_path):
    scale = GradeScale(name="mild", labels=("fine", "poor"), critical=(), cost=((0, 1), (1, 0)))
    page = Page(report(folder_of(federations, tmp_path, federations.Story(scale=scale))))
    assert "names no critical grade" in page.text
    assert ("metric", "miss") not in page.figures


def test_each_partner_is_measured_against_its_own_ceiling(federations, tmp_path):
    folder = folder_of(federations, tmp_path, epsilon_limits={"turin": 3.25})
    text = Page(report(folder)).text
    assert "3.00 of 3.25" in text
    assert "of a ceiling of 3.25" in text


def test_the_report_is_written_where_it_belongs_and_says_so(troubled_folder, tmp_path):
    folder = shutil.copytree(troubled_folder, tmp_path / "copy")
    path = write_report(folder, roster=None, now=NOW)
    assert path == folder / "report" / "privacy.html"
    assert path.read_text(encoding="utf-8") == report(troubled_folder)
    roster = read_roster(folder / "roster.json")
    assert write_report(folder, roster=roster, now=NOW).read_text(encoding="utf-8") == report(
        troubled_folder, roster_source="verifier"
    )
    assert [one.name for one in path.parent.iterdir()] == ["privacy.html"]


def test_a_changed_byte_leaves_no_report(troubled_folder, tmp_path):
    folder = shutil.copytree(troubled_folder, tmp_path / "copy")
    ledger = folder / "sites" / "turin" / "ledger.jsonl"
    raw = bytearray(ledger.read_bytes())
    raw[len(raw) // 2] ^= 1
    ledger.write_bytes(raw)
    with pytest.raises(LedgerBroken, match=r"turin/ledger\.jsonl: entry \d+"):
        write_report(folder, roster=None, now=NOW)
    assert not (folder / "report").exists()


def test_another_roster_than_the_folders_is_not_overruled_by_it(troubled_folder, tmp_path):
    folder = shutil.copytree(troubled_folder, tmp_path / "copy")
    roster = read_roster(folder / "roster.json")
    strangers = type(roster)(
        coordinator=SigningKey.generate().public, sites={site: SigningKey.generate().public for site in roster.sites}
    )
    with pytest.raises((LedgerBroken, SignatureRefused)):
        write_report(folder, roster=strangers, now=NOW)
    assert not (folder / "report").exists()


def test_a_report_that_cannot_be_written_is_one_clear_error(troubled_folder, tmp_path):
    folder = shutil.copytree(troubled_folder, tmp_path / "copy")
    (folder / "report").write_text("in the way")
    with pytest.raises(DocumentRefused, match=r"privacy\.html: cannot be written"):
        write_report(folder, roster=None, now=NOW)
    assert (folder / "report").read_text() == "in the way"


def test_a_compliance_laptop_needs_neither_torch_nor_flower_nor_a_display(troubled_folder, tmp_path):
    folder = shutil.copytree(troubled_folder, tmp_path / "copy")
    script = (
        "import sys, datetime, pathlib\n"
        "from fedgrade.report import write_report\n"
        "write_report(pathlib.Path(sys.argv[1]), roster=None, now=datetime.datetime.now(datetime.UTC))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'torch', 'flwr', 'opacus', 'opendp', 'hydra',"
        " 'onnxruntime', 'timm', 'grpc', 'tkinter', 'PyQt5', 'gi'}))\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in {"DISPLAY", "WAYLAND_DISPLAY"}}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(folder)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["[]", "False"]
