"""``fedgrade demo``, ``run`` and ``resume``: what a coordinator types to have a model trained."""

import logging
import secrets
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, get_args

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedgrade.data import elpv
from fedgrade.errors import FedgradeError, JobRefused
from fedgrade.federation.rounds import stages_of
from fedgrade.federation.verification import FederationProof, verify_federation
from fedgrade.job import JobSpec, TrainingJob, plan_job
from fedgrade.privacy.accounting import printed
from fedgrade.privacy.plan import DistributedSpec
from fedgrade.trust.identity import site_id
from server.attached import is_served
from server.configure import compose_job, describe
from server.coordinator_folder import CoordinatorFolder, Patience
from server.engines import Engine, run_engine
from server.local_federation import LocalFederation, Terms, create_local_federation, declared_size
from server.progress_board import progress_board
from server.run_lock import run_lock
from server.run_record import let_go_on
from server.summary import announce, quality_table

logger = logging.getLogger(__name__)

FOLDER = click.Path(path_type=Path, file_okay=False)
ENGINES = get_args(Engine)
SERVED: Final = "served"
# A local federation's recyclers allow this much over all jobs there will ever be; each may edit its own policy.yaml.
LIFETIME_EPSILON = 8.0
_DEADLINE = click.option(
    "--deadline", type=click.FloatRange(min=1.0),
    help="Seconds that a stage waits for sites; whoever is silent then is left alone for some stages. "
    f"{Patience.deadline_seconds:g} for a new job; one that goes on keeps its own unless you give it.",
)  # fmt: skip
_WAIT = click.option(
    "--wait", type=click.FloatRange(min=0.0),
    help="Seconds to wait for sites whose operators are still to approve the job, or that are outside of their hours. "
    f"{Patience.admission_seconds:g} for a new job; one that goes on keeps its own unless you give it.",
)  # fmt: skip


@click.command(epilog="Example: fedgrade demo privacy.target_epsilon=2")
@click.option("--folder", type=FOLDER, default=Path("runs"), show_default=True, help="Where everything is written.")
@click.option("--engine", type=click.Choice(ENGINES), default="deployed", show_default=True)
@click.argument("overrides", nargs=-1)
def demo(folder: Path, engine: Engine, overrides: tuple[str, ...]) -> None:
    """Five recyclers train one grading model on real photos, privately, over a real Flower deployment.

    Each demo is a new federation with new keys and new ledgers; features are cached between demos. OVERRIDES are
    Hydra's, as for `fedgrade run`.
    """
    console = Console(soft_wrap=True)
    spec = compose_job(["experiment=demo", *overrides])
    console.print(f"Real data: ELPV solar cells, {elpv.LICENCE}.\n{elpv.CITATION}", style="dim", highlight=False)
    root = folder / f"demo-{datetime.now(UTC):%Y%m%dT%H%M%S}"
    # Solved before anything is created, so that a plan that cannot be leaves no federation behind.
    _plan_for_new(spec)
    console.print(f"Everything goes to {root}")
    terms = Terms.for_job(spec, epsilon_limit=_charged_at_most(spec))
    federation = create_local_federation(root, scale=spec.grading, data=spec.data, terms=terms, cache=folder / "cache")
    with run_lock(root):
        job = _put_job(federation, spec, Patience())
        proof = _run(console, federation, job, engine=engine)
        # Only now: whoever follows the link finds a demo that was finished.
        _point(folder / "demo", root)
        _summarise(console, proof, job, federation, shown=folder / "demo")


@click.command(epilog="Example: fedgrade run experiment=pilot privacy.target_epsilon=2")
@click.option(
    "--federation", "folder", type=FOLDER, default=Path("runs/federation"), show_default=True,
    help="Folder of a local federation; a new one with five recyclers is made where there is none.",
)  # fmt: skip
@click.option(
    "--engine", type=click.Choice([*ENGINES, SERVED]), default="deployed", show_default=True,
    help="served: the job goes to the SuperLink that `fedgrade serve` runs, and to partners on their own machines.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="The same as `fedgrade resume`.")
@_DEADLINE
@_WAIT
@click.option("--groups", is_flag=True, help="List what can be chosen, and stop.")
@click.argument("overrides", nargs=-1)
def run(
    folder: Path,
    engine: Engine | Literal["served"],
    overrides: tuple[str, ...],
    *,
    resume: bool,
    deadline: float | None,
    wait: float | None,
    groups: bool,
) -> None:
    """Run one job over a federation whose ledgers remember every job before it.

    OVERRIDES choose and change the job: a group (privacy=local_sgd), a value (privacy.target_epsilon=2).

    With --engine served, Ctrl-C leaves the run going; see `fedgrade watch`, `resume` and `stop`.
    """
    if groups:
        click.echo(describe())
        return
    patience = Patience().but(deadline_seconds=deadline, admission_seconds=wait)
    if resume:
        _go_on(folder, engine, deadline=deadline, wait=wait)
    elif engine == SERVED:
        # Imported here: Flower takes a second.
        from server.served_run import run_served  # noqa: PLC0415

        run_served(Console(soft_wrap=True), folder, overrides=overrides, patience=patience)
    else:
        spec, federation = compose_job(list(overrides)), _on_this_machine(folder)
        if not federation.exists:
            # Solved before anything is created, so that a plan that cannot be leaves no federation behind.
            _plan_for_new(spec)
            terms = Terms.for_job(spec, epsilon_limit=LIFETIME_EPSILON)
            create_local_federation(
                folder, scale=spec.grading, data=spec.data, terms=terms, cache=folder.parent / "cache"
            )
        with run_lock(folder):
            _run_here(federation, _put_job(federation, spec, patience), engine)


@click.command(epilog="Example: fedgrade resume federation")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option(
    "--engine", type=click.Choice([*ENGINES, SERVED]), default=None,
    help="served where partners are on machines of their own, deployed elsewhere, unless you say otherwise.",
)  # fmt: skip
@_DEADLINE
@_WAIT
def resume(folder: Path, engine: Literal["served"] | Engine | None, deadline: float | None, wait: float | None) -> None:
    """Go on with the job that was interrupted or stopped in FOLDER, or follow the one that is on.

    It goes on from the last checkpoint: no site is asked, or charged, again for what it answered. The same as `fedgrade
    run --resume`.
    """
    chosen = engine or (SERVED if CoordinatorFolder(root=folder).book.exists() or is_served(folder) else "deployed")
    _go_on(folder, chosen, deadline=deadline, wait=wait)


def _go_on(folder: Path, engine: Engine | Literal["served"], *, deadline: float | None, wait: float | None) -> None:
    """Take up the job that lies in ``folder``, with the patience it had but for what is given."""
    if engine == SERVED:
        # Imported here: Flower takes a second.
        from server.served_run import resume_served  # noqa: PLC0415

        resume_served(Console(soft_wrap=True), folder, deadline=deadline, wait=wait)
        return
    federation = _on_this_machine(folder)
    # Read first: a folder in which nothing was begun is left as it is.
    federation.coordinator.read_job()
    with run_lock(folder):
        federation.coordinator.renew_patience(deadline_seconds=deadline, admission_seconds=wait)
        _run_here(federation, federation.coordinator.read_job(), engine)


def _on_this_machine(folder: Path) -> LocalFederation:
    federation = LocalFederation(root=folder)
    if federation.coordinator.book.exists():
        raise JobRefused(f"{folder}: its partners are on machines of their own; give --engine {SERVED}")
    return federation


def _run_here(federation: LocalFederation, job: TrainingJob, engine: Engine) -> None:
    console = Console(soft_wrap=True)
    # Nobody else runs a job here: the lock is held.
    let_go_on(federation.coordinator.job_folder(job), on=False)
    proof = _run(console, federation, job, engine=engine)
    _summarise(console, proof, job, federation, shown=federation.root)


def _plan_for_new(spec: JobSpec) -> None:
    """Refuse a plan that no new local federation could run."""
    manifests = elpv.site_manifests(spec.grading, test_fraction=spec.data.test_fraction)
    declared = {site_id(name): declared_size(manifest, spec.grading) for name, manifest in manifests.items()}
    plan_job(spec, declared_items=declared, nonce=secrets.token_hex(16))


def _charged_at_most(spec: JobSpec) -> float:
    """The most that an account pays for a job like ``spec``: what everyone else together could learn."""
    privacy = spec.privacy
    training = privacy.floor_epsilon if isinstance(privacy, DistributedSpec) else privacy.target_epsilon
    return max(training, privacy.evaluation_epsilon)


def _put_job(federation: LocalFederation, spec: JobSpec, patience: Patience) -> TrainingJob:
    job = plan_job(spec, declared_items=federation.declared_items(), nonce=secrets.token_hex(16))
    federation.coordinator.put_job(job, patience)
    return job


def _run(console: Console, federation: LocalFederation, job: TrainingJob, *, engine: Engine) -> FederationProof:
    """What the federation proves after ``job`` has run to its release."""
    began = time.monotonic()
    announce(console, job)
    with progress_board(console, stages=len(stages_of(job))) as board:
        run_engine(engine, federation, board)
    proof = verify_federation(federation.root, roster=federation.coordinator.read_roster())
    console.print(f"{proof.entries} ledger entries verified; {time.monotonic() - began:.0f} s in all")
    return proof


def _summarise(
    console: Console,
    proof: FederationProof,
    job: TrainingJob,
    federation: LocalFederation,
    *,
    shown: Path,
) -> None:
    from fedgrade.report.privacy import write_report  # noqa: PLC0415 - matplotlib takes its time

    proved = proof.jobs[job.digest]
    if proved.release is None:
        raise FedgradeError(f"job {job.digest[:16]}: no release came of it; see {federation.root / 'logs'}")
    spent = Table(
        f"epsilon per item at delta {float(job.plan.delta):g}",
        "coordinator",
        "other partner",
        "model holder",
        "all collude",
        box=None,
    )
    for site, seen in proved.observers.items():
        spent.add_row(
            site,
            *(printed(e) for e in (seen.coordinator, seen.other_partner, seen.model_holder, seen.full_collusion)),
        )
    report = write_report(federation.root, roster=None, now=datetime.now(UTC))
    release = shown / "jobs" / job.digest[:16] / "release"
    console.print(quality_table(proved.release.release.metrics, job), spent)
    console.print(f"model release   {release}")
    console.print(f"privacy report  {shown / report.relative_to(federation.root)}")
    # As this process was started: an installed command need not be on the path.
    command = escape(shlex.quote(sys.argv[0]))
    console.print(
        "\nNext:\n"
        f"  {command} verify {shown}\n"
        f"  {command} grade --model {release} PHOTO.png\n"
        f"  {command} publish {shown} --to published\n"
        f"  {command} run experiment=pilot privacy.target_epsilon=2\n"
        "The last one starts a federation whose ledgers remember: run it until a partner's budget refuses."
    )


def _point(link: Path, target: Path) -> None:
    """Make ``link`` lead to ``target``, as one step."""
    temporary = link.with_name(link.name + ".new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    temporary.replace(link)
