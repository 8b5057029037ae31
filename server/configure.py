"""From ``conf/`` and what a person typed to a :class:`JobSpec`. The one file that knows Hydra, which stops here.

Hydra composes the values; what comes out passes the same strict decoder as everything else. Before it does, every
override is held against what is there: an override chooses an option of a group or changes a value, and does nothing
else. Hydra's further powers (adding and deleting keys, sweeps, packages, interpolations that read the environment, its
own settings) are refused, because a job's configuration must be all there is to see in it. Nothing is written, no
logging is configured and no folder is changed to.
"""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NoReturn

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedgrade.errors import DocumentRefused, JobRefused
from fedgrade.job import JobSpec
from fedgrade.trust.canonical import decode

# Beside this package in a checkout and in site-packages alike; a folder named conf elsewhere on the path cannot take
# its place.
CONF: Final = Path(__file__).resolve().parent.parent / "conf"
OPEN_VALUE: Final = "???"  # OmegaConf's mark for a value that somebody has yet to give
_SHOWN: Final = 80  # characters of a refused override


def compose_job(overrides: Sequence[str]) -> JobSpec:
    """The job that ``conf/`` and ``overrides`` describe, for example ``["experiment=pilot", "privacy.rounds=50"]``.

    Raises:
        JobRefused: one line that names the override or key at fault, and what would do instead.
    """
    parsed = [_parse(raw) for raw in overrides]
    _require_once(parsed)
    options = groups()
    chosen = [override for override in parsed if override.key_or_group in options]
    changed = [override for override in parsed if override.key_or_group not in options]
    for override in chosen:
        _require_option(override, options[override.key_or_group])
    for override in changed:
        _require_known(override, _keys(tuple(_line(choice) for choice in chosen)))
    return _decode(_compose([_line(override) for override in (*chosen, *changed)]))


def groups() -> dict[str, tuple[str, ...]]:
    """Every group that an override may choose from, with its options."""
    found: dict[str, list[str]] = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        found.setdefault(path.parent.name, []).append(path.stem)
    return {group: tuple(options) for group, options in found.items()}


def describe() -> str:
    """Groups, options and a phrase for each, as text for a person; the defaults are marked with a star."""
    defaults = _defaults()
    options = groups()
    width = max(len(f"{group}={option}") for group, several in options.items() for option in several)
    lines: list[str] = []
    for group, several in options.items():
        lines.append(f"{group}:")
        for option in several:
            star = "*" if defaults.get(group) == option else " "
            lines.append(f" {star} {f'{group}={option}':<{width}}  {_phrase(CONF / group / f'{option}.yaml')}")
    return "\n".join([*lines, "", "Any value can be changed too, for example privacy.target_epsilon=2."])


def _parse(raw: str) -> Override:
    if "${" in raw:
        _refuse(raw, "interpolations are not read here; write the value itself")
    try:
        override = OverridesParser.create().parse_override(raw)
    except (HydraException, ValueError, RecursionError) as error:
        raise JobRefused(f"override {raw[:_SHOWN]!r}: not KEY=VALUE ({_one_line(error)})") from error
    if not override.key_or_group:
        _refuse(raw, "not KEY=VALUE (there is no key)")
    if override.type is not OverrideType.CHANGE:
        _refuse(raw, "keys are neither added nor deleted; write KEY=VALUE with a key that the job has")
    if override.key_or_group.partition(".")[0].partition("/")[0] == "hydra":
        _refuse(raw, "hydra's own settings are not part of a job")
    if override.package is not None:
        _refuse(raw, "packages (@) are not used here; write GROUP=OPTION or KEY=VALUE")
    if override.is_sweep_override():
        _refuse(raw, "several values at once; one job has one, and a list is written [a,b]")
    if override.value() == OPEN_VALUE:
        _refuse(raw, f"{OPEN_VALUE} stands for no value at all")
    return override


def _require_once(overrides: Sequence[Override]) -> None:
    keys = [override.key_or_group for override in overrides]
    for override in overrides:
        if keys.count(override.key_or_group) > 1:
            raise JobRefused(f"{override.key_or_group[:_SHOWN]}: given twice; keep one")


def _require_option(override: Override, options: Sequence[str]) -> None:
    if override.value() not in options:
        raise JobRefused(
            f"{override.key_or_group}: no option {str(override.value())[:_SHOWN]!r}; choose one of {', '.join(options)}"
        )


def _require_known(override: Override, known: Sequence[str]) -> None:
    key = override.key_or_group
    if key == "privacy.mode":
        raise JobRefused(
            f"{key}: comes with the option; choose one with privacy={' or privacy='.join(groups()['privacy'])}"
        )
    if key in known:
        return
    # People misspell keys and forget the group; both are looked for.
    near = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    near += [name for name in difflib.get_close_matches(key, [*known, *groups()], cutoff=0.7) if name not in near]
    hint = f"did you mean {' or '.join(near[:3])}?" if near else "`fedgrade run --groups` lists what there is"
    raise JobRefused(f"{key[:_SHOWN]}: unknown key in this job; {hint}")


@lru_cache(maxsize=64)
def _keys(choices: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of a job with these options; other options bring other keys."""
    return tuple(key for key, _ in _leaf_values(_compose(choices)))


def _line(override: Override) -> str:
    """The override as it was typed."""
    return override.input_line or ""


def _compose(lines: Sequence[str]) -> dict[str, Any]:
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF), job_name="fedgrade"):
            composed = OmegaConf.to_container(
                compose("job", overrides=list(lines)), resolve=True, throw_on_missing=True
            )
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise JobRefused(f"job: cannot be composed: {_one_line(error)}") from error
    tree: dict[str, Any] = json.loads(json.dumps(composed))
    return tree


def _decode(tree: dict[str, Any]) -> JobSpec:
    for key, value in _leaf_values(tree):
        if isinstance(value, float) and not math.isfinite(value):
            raise JobRefused(f"{key}: {value} is not a number that can be counted with")
    canonical = json.dumps(tree, sort_keys=True, allow_nan=False).encode()
    try:
        return decode(JobSpec, canonical, what="job")
    except DocumentRefused as error:
        # The decoder names the variant of a union inside the path; people know the key without it.
        text = str(error).removeprefix("job: ")
        mode = tree["privacy"]["mode"]
        raise JobRefused(text.replace(f"privacy.{mode}.", "privacy.", 1)) from error


def _leaf_values(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys of ``tree`` with their values; a list is one value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaf_values(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _defaults() -> dict[str, str | None]:
    """The option that ``job.yaml`` chooses of each group."""
    entries = yaml.safe_load((CONF / "job.yaml").read_text())["defaults"]
    return {group: option for entry in entries if isinstance(entry, dict) for group, option in entry.items()}


def _phrase(path: Path) -> str:
    """The first comment of a configuration file, which says what the option is."""
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((comment for comment in comments if not comment.startswith("@")), "")


def _refuse(raw: str, why: str) -> NoReturn:
    raise JobRefused(f"override {raw[:_SHOWN]!r}: {why}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:240]
