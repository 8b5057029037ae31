"""Measures fedgrade and writes the figures, with how they were got, into docs/benchmarks.md.

Sections: ``quality`` (QWK and critical misses against epsilon), ``rounds`` (seconds a round on the wire and in one
process, side by side), ``null_rounds`` (rounds without work beside stock Flower and NVFlare), ``idle`` (a node that is
not asked), ``sites`` (many on one machine), ``demo`` (wall time of the main job, cold and warm), ``gradients`` (a step
of item gradients beside Opacus' ways), ``noise`` (samples a second), ``accountants`` (epsilon by five of them),
``ledger``, ``secure_sum`` and ``utility`` (ways of training under privacy). Each run replaces its own section alone.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from accountants import accountants
from features import public_features
from idle import idle
from ledgers import ledger
from many_sites import many_sites
from matplotlib.axes import Axes
from null_rounds import null_rounds
from quality import EPSILONS, SETTINGS, Outcome, load_photos, outcome
from samplers import noise
from sections import replace_section
from secure_sum import secure_sum
from utility import utility

from fedgrade.data import elpv
from fedgrade.evaluation import metrics
from fedgrade.federation.progress import Progress
from fedgrade.job import JobSpec, plan_job
from server.configure import compose_job
from server.engines import run_engine
from server.local_federation import Terms, create_local_federation

SECTIONS = (
    "quality", "utility", "gradients", "noise", "accountants", "ledger", "secure_sum", "rounds", "null_rounds", "idle",
    "sites", "demo",
)  # fmt: skip
TIMED_ROUNDS = 15
FIGURES: dict[str, Callable[[Outcome, JobSpec], float]] = {
    "QWK": lambda run, spec: metrics(run.median_counts, spec.grading).quadratic_weighted_kappa,
    "critical misses": lambda run, spec: metrics(run.counts, spec.grading).critical_miss_rate,
    "mean cost": lambda run, spec: metrics(run.counts, spec.grading).mean_cost,
}


def quality(spec: JobSpec, *, cache: Path, docs: Path, seeds: int) -> str:
    """The table and picture of quality against privacy."""
    photos = load_photos(public_features(spec, cache=cache))
    outcomes: dict[tuple[str, float | None], list[Outcome]] = {}
    for setting in SETTINGS:
        for epsilon in EPSILONS:
            runs = [outcome(photos, spec, setting=setting, epsilon=epsilon, seed=seed) for seed in range(seeds)]
            outcomes[setting, epsilon] = runs
            sys.stderr.write(f"quality: {setting} at epsilon {epsilon}\n")
    lines = ["| setting | " + " | ".join("ε = ∞" if e is None else f"ε = {e:g}" for e in EPSILONS) + " |"]
    lines.append("|---" * (len(EPSILONS) + 1) + "|")
    for title, figure in FIGURES.items():
        for setting in SETTINGS:
            cells = [_spread([figure(run, spec) for run in outcomes[setting, epsilon]]) for epsilon in EPSILONS]
            lines.append(f"| {title}, {setting} | " + " | ".join(cells) + " |")
    _draw(spec, outcomes, docs / "quality.svg")
    setup = (
        f"Mode `local`, {spec.privacy.rounds} rounds, learning rate {spec.aggregation.learning_rate:g}; "
        f"{len(elpv.RECYCLERS)} recyclers; 5 module-disjoint folds; {seeds} noise seeds, mean ± standard deviation "
        "over seeds. QWK is that of the median grade, the field's usual reading; misses and mean cost are those of the "
        "product's decision, which minimises the expected cost of `conf/grading/solar_cells.yaml`. "
        "*Pooled* is one party with all photos and one share of noise; *federated* has each recycler's own noise in "
        "full; *alone* is the average recycler with its own photos only, tested on everyone's. Rounds and learning "
        "rate were chosen on these same public photos: read the order, not the third digit."
    )
    return "\n".join([setup, "", *lines, "", "![Quality against privacy](quality.svg)"])


def rounds(spec: JobSpec, *, cache: Path) -> str:
    """Seconds a training round takes on the wire and in one process, alternating, on the real photos."""
    timed: dict[str, list[float]] = {"deployed": [], "in-process": []}
    short = replace(spec, privacy=replace(spec.privacy, rounds=TIMED_ROUNDS))
    for _ in range(2):
        for engine in timed:
            timed[engine] += _round_seconds(short, engine, cache)
    lines = ["| engine | median s a round | least | most |", "|---|---|---|---|"]
    for engine, seconds in timed.items():
        lines.append(f"| {engine} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} |")
    ratio = statistics.median(timed["deployed"]) / statistics.median(timed["in-process"])
    return "\n".join([*lines, "", f"Wire over process: {ratio:.2f}. Two runs of {TIMED_ROUNDS} rounds each, in turn."])


def demo(spec: JobSpec, *, cache: Path) -> str:
    """Wall time of ``fedgrade demo`` with empty caches and then with full ones."""
    del spec, cache
    command = str(Path(sys.executable).parent / "fedgrade")
    with tempfile.TemporaryDirectory(prefix="fedgrade-bench-") as folder:
        seconds = {}
        for state in ("cold", "warm"):
            began = time.monotonic()
            subprocess.run([command, "demo", "--folder", folder], check=True, stdout=subprocess.DEVNULL)
            seconds[state] = time.monotonic() - began
    return "\n".join([
        "| `fedgrade demo` | wall time, s |", "|---|---|",
        f"| cold: backbone exported, every photo extracted | {seconds['cold']:.0f} |",
        f"| warm: features cached | {seconds['warm']:.0f} |", "",
        "`make demo` adds the installation of the packages the first time (about 4 minutes and 6.5 GB when measured).",
    ])  # fmt: skip


def _round_seconds(spec: JobSpec, engine: str, cache: Path) -> list[float]:
    with tempfile.TemporaryDirectory(prefix="fedgrade-bench-") as folder:
        limit = spec.privacy.target_epsilon
        terms = Terms(modes=(spec.privacy.mode,), epsilon_limit=limit, epsilon_per_job=limit)
        federation = create_local_federation(
            Path(folder) / "federation", scale=spec.grading, data=spec.data, terms=terms, cache=cache
        )
        federation.coordinator.put_job(plan_job(spec, declared_items=federation.declared_items(), nonce="0" * 32))
        stopwatch = _Stopwatch()
        run_engine(engine, federation, stopwatch)
    return [after - before for before, after in itertools.pairwise(stopwatch.stamps)]


class _Stopwatch:
    """Notes when each training round ended."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def note(self, line: str) -> None:
        pass

    def features(self, percent: int) -> None:
        pass

    def watch(self, progress: Progress) -> None:
        if progress.purpose == "train":
            self.stamps.append(time.monotonic())


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(set(values)) > 1 else f"{values[0]:.3f}"


def _draw(spec: JobSpec, outcomes: dict[tuple[str, float | None], list[Outcome]], path: Path) -> None:
    """QWK and critical misses against epsilon, a line a setting, a band of one standard deviation."""
    plt.rcParams["svg.hashsalt"] = "fedgrade"
    drawing, axes = plt.subplots(1, len(FIGURES), figsize=(12, 3.6), layout="constrained")
    finite = [epsilon for epsilon in EPSILONS if epsilon is not None]
    for axis, (title, figure) in zip(axes, FIGURES.items(), strict=True):
        for setting, colour in zip(SETTINGS, ("#1b6ca8", "#c1440e", "#6b6b6b"), strict=True):
            values = [[figure(run, spec) for run in outcomes[setting, epsilon]] for epsilon in finite]
            mean, spread = np.mean(values, axis=1), np.std(values, axis=1)
            axis.plot(finite, mean, color=colour, marker="o", markersize=4, label=setting)
            axis.fill_between(finite, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)
            axis.axhline(figure(outcomes[setting, None][0], spec), color=colour, linewidth=0.8, linestyle=":")
        _label_ends(axis, x=finite[0])
        axis.set_xscale("log", base=2)
        axis.set_xticks(finite, [f"{epsilon:g}" for epsilon in finite])
        axis.set_xlim(min(finite) * 0.9, max(finite) * 1.9)
        axis.set_xlabel("epsilon a site, delta 1e-5 (dotted: no privacy)")
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, metadata={"Date": None})
    plt.close(drawing)


def _label_ends(axis: Axes, *, x: float) -> None:
    """Each line's name beside its end at ``x``, moved apart where two would stand on each other."""
    low, high = axis.get_ylim()
    gap, next_free = (high - low) / 16, low
    ends = sorted((line.get_ydata()[0], line) for line in axis.lines if not line.get_label().startswith("_"))
    for end, line in ends:
        next_free = max(end, next_free)
        axis.annotate(
            line.get_label(),
            (x, end),
            xytext=(x * 1.08, next_free),
            textcoords="data",
            color=line.get_color(),
            va="center",
            fontsize=9,
        )
        next_free += gap


def gradients_in_one_thread() -> str:
    """The section of ``gradients.py``, in a process of its own: numpy reads how many threads it has when it starts."""
    program = Path(__file__).with_name("gradients.py")
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program)], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return done.stdout.rstrip("\n")


def main() -> None:
    """Measure the sections that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--write", type=Path, required=True, help="the file that holds the figures")
    parser.add_argument("--cache", type=Path, default=Path("runs/cache"), help="where features are kept")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"no section {min(unknown)!r}; there are {', '.join(SECTIONS)}")
    spec = compose_job(["experiment=demo"])
    # Where each site's noise is its own, an epsilon is one plan, however many take part.
    local = compose_job(["experiment=demo", "privacy=local", "aggregation=mean"])
    measure: dict[str, Callable[[], str]] = {
        "quality": lambda: quality(local, cache=given.cache / "bench", docs=given.write.parent, seeds=given.seeds),
        "utility": lambda: utility(local, load_photos(public_features(local, cache=given.cache / "bench"))),
        "gradients": gradients_in_one_thread,
        "noise": lambda: noise(spec),
        "accountants": accountants,
        "ledger": ledger,
        "secure_sum": secure_sum,
        "rounds": lambda: rounds(spec, cache=given.cache),
        "null_rounds": lambda: null_rounds(cache=given.cache),
        "idle": lambda: idle(spec, cache=given.cache),
        "sites": lambda: many_sites(cache=given.cache),
        "demo": lambda: demo(spec, cache=given.cache),
    }
    for section in given.sections or SECTIONS:
        replace_section(given.write, section, measure[section](), command=f"make bench ARGS={section}")
        sys.stderr.write(f"{section}: written to {given.write}\n")


if __name__ == "__main__":
    main()
