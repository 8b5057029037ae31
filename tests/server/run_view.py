"""A view of a run with something of everything, as `fedgrade watch` would show it."""

from datetime import UTC, datetime, timedelta

from fedgrade.federation.progress import Progress
from fedgrade.federation.rounds import Stage
from fedgrade.trust.enrolment import utc_text
from server.run_now import Awaited, Refusals, Refused
from server.runs import KnownRun
from server.watch_page import RunView

NOW = datetime(2026, 11, 21, 14, 30, tzinfo=UTC)


def stage(number, *, stages=62, sites=20, **absent):
    return Progress(
        stage=number, stages=stages, purpose="train", answered=sites - len(absent), participants=sites,
        finished=utc_text(NOW - timedelta(seconds=30 * (24 - number))),
        absent={name.replace("_", "-"): how for name, how in absent.items()},
    )  # fmt: skip


def big(*, sites=20, rounds=60, done=23):
    """A view of a run with something of everything."""
    names = tuple(f"site-{number:02d}" for number in range(sites))
    training = (Stage(purpose="train", round_index=index) for index in range(rounds))
    stages = (Stage(purpose="centre", round_index=0), *training, Stage(purpose="evaluate", round_index=0))
    progress = []
    for number in range(1, done + 1):
        absent = {"site_04": "refused" if number == 1 else "out"}
        if number >= 20:
            absent["site_07"] = "silent" if number == 20 else "resting"
        progress.append(stage(number, stages=len(stages), sites=sites, **absent))
    run = KnownRun(
        job="3f9a12c0d4e5b677", name="pumps\x1b[2J", began=utc_text(NOW - timedelta(minutes=13)), changed=utc_text(NOW),
        done=done, stages=len(stages), epsilon=4.0, state="on",
    )  # fmt: skip
    return RunView(
        run=run, participants=names, stages=stages, progress=tuple(progress),
        awaited=Awaited(asked=utc_text(NOW - timedelta(seconds=80)), sites=(names[2],)),
        refusals=Refusals(sites={names[4]: Refused(time=utc_text(NOW), words="refused (budget): spent\x07")}),
        revoked=frozenset(),
    )  # fmt: skip
