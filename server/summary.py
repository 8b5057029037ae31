"""What a coordinator's operator is told before and after a job."""

from rich.console import Console
from rich.table import Table

from fedgrade.evaluation import GradingMetrics
from fedgrade.job import TrainingJob
from fedgrade.privacy.accounting import printed


def announce(console: Console, job: TrainingJob) -> None:
    """Say what is about to run."""
    console.print(
        f"Job [bold]{job.spec.name}[/bold]: {len(job.participants)} sites, privacy mode {job.plan.mode}, "
        f"epsilon {printed(float(job.plan.target_epsilon))} per item at delta {float(job.plan.delta):g}, "
        f"{job.plan.rounds} rounds"
    )


def quality_table(metrics: GradingMetrics, job: TrainingJob) -> Table:
    """How good the model is, as it was measured under differential privacy."""
    quality = Table("measured on held-out items, with differential privacy", "", box=None)
    quality.add_row("quadratic weighted kappa", f"{metrics.quadratic_weighted_kappa:.3f}")
    quality.add_row("accuracy", f"{metrics.accuracy:.1%}")
    quality.add_row("mean cost of a wrong grade, per item", f"{metrics.mean_cost:.2f}")
    quality.add_row(f"misses of {', '.join(job.spec.grading.critical)}", f"{metrics.critical_miss_rate:.1%}")
    return quality
