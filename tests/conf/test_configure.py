"""Every configuration composes and decodes; everything else is refused with one line that names it."""

import ast
import itertools
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedgrade.aggregation.mean import AggregationSpec
from fedgrade.errors import JobRefused
from fedgrade.grading import GradeScale
from fedgrade.job import DataSpec, JobSpec, plan_job
from fedgrade.model.spec import LITE0_WEIGHTS_DIGEST, ModelSpec
from fedgrade.privacy.plan import DistributedSpec, LocalSgdSpec, LocalSpec, PrivacySpec
from fedgrade.trust.canonical import decode, encode
from fedgrade.trust.identity import SiteId
from server import configure
from server.configure import CONF, compose_job, describe, groups

SPECS = {
    "data": (DataSpec,),
    "model": (ModelSpec,),
    "grading": (GradeScale,),
    "privacy": (LocalSpec, DistributedSpec, LocalSgdSpec),
    "aggregation": (AggregationSpec,),
}
ALL_CHOICES = [
    [f"{group}={option}" for group, option in zip(groups(), options, strict=True)]
    for options in itertools.product(*groups().values())
]


# A whole network is for local_sgd alone; shares of noise need a secure sum, and updates of local_sgd fit none.
APART = {
    ("model=resnet10t_gn", "privacy=local"): "model.trainable: 'network' needs privacy.mode 'local_sgd'",
    ("model=resnet10t_gn", "privacy=distributed"): "model.trainable: 'network' needs privacy.mode 'local_sgd'",
    ("privacy=distributed", "aggregation=mean"): "aggregation.method: 'mean' would show the coordinator each upload",
    ("privacy=local_sgd", "aggregation=secure_sum"): "aggregation.method: 'secure_sum' adds integers",
}
POSSIBLE = [choices for choices in ALL_CHOICES if not any(set(pair) <= set(choices) for pair in APART)]


@pytest.mark.parametrize("choices", POSSIBLE, ids=",".join)
def test_every_combination_of_options_composes_and_survives_the_wire(choices):
    spec = compose_job(choices)
    assert decode(JobSpec, encode(spec)) == spec


@pytest.mark.parametrize("choices", [choices for choices in ALL_CHOICES if choices not in POSSIBLE], ids=",".join)
def test_options_that_do_not_go_together_are_refused_by_name(choices):
    reasons = [reason for pair, reason in APART.items() if set(pair) <= set(choices)]
    with pytest.raises(JobRefused) as refused:
        compose_job(choices)
    assert any(reason in str(refused.value) for reason in reasons)


@pytest.mark.parametrize("choices", POSSIBLE, ids=",".join)
def test_every_combination_of_options_has_a_privacy_plan(choices):
    declared = {SiteId(f"recycler-{letter}"): 400 for letter in "abcde"}
    job = plan_job(compose_job(choices), declared_items=declared, nonce="0" * 32)
    assert job.plan.mode == job.spec.privacy.mode


def test_the_defaults_are_the_values_that_the_decisions_name():
    spec = compose_job([])
    assert isinstance(spec.privacy, LocalSpec)
    assert (spec.privacy.target_epsilon, spec.privacy.delta, spec.privacy.centre_share) == (4.0, 1e-5, 0.1)
    assert (spec.aggregation.momentum, spec.aggregation.average_last, spec.aggregation.minimum_sites) == (0.9, 0.5, 3)
    assert spec.model.weights_digest == LITE0_WEIGHTS_DIGEST


def test_the_command_of_the_readme_composes():
    spec = compose_job(["experiment=pilot", "privacy.target_epsilon=2", "model=efficientnet_lite0"])
    assert spec.name == "pilot"
    assert repr(spec.privacy.target_epsilon) == "2.0"


def test_what_is_typed_wins_over_the_experiment_and_the_option():
    spec = compose_job(["privacy=local_sgd", "experiment=pilot", "privacy.target_epsilon=3.5", "name=mine"])
    assert isinstance(spec.privacy, LocalSgdSpec)
    assert (spec.name, spec.privacy.target_epsilon) == ("mine", 3.5)


def test_lists_and_quoted_text_are_values_like_any_other():
    spec = compose_job(["model.pooling=[average]", "data.asset_type='pump, centrifugal'", "grading.critical=[]"])
    assert (spec.model.pooling, spec.data.asset_type, spec.grading.critical) == (
        ("average",),
        "pump, centrifugal",
        (),
    )


@pytest.mark.parametrize(
    ("override", "naming"),
    [
        ("privacy.target_epsilonn=2", "privacy.target_epsilonn: unknown key.*did you mean privacy.target_epsilon"),
        ("target_epsilon=2", "target_epsilon: unknown key.*did you mean privacy.target_epsilon"),
        ("privcy=local", "privcy: unknown key.*did you mean privacy"),
        ("privacy.sampling_rate=0.1", "privacy.sampling_rate: unknown key in this job"),
        ("utterly.elsewhere=1", "utterly.elsewhere: unknown key.*--groups"),
        ("privacy=locl", "privacy: no option 'locl'; choose one of distributed, local, local_sgd"),
        ("privacy=null", "privacy: no option 'None'"),
        ("privacy=[local]", "privacy: no option"),
        ("privacy={mode: local}", "privacy: no option"),
        ("experiment=../job", "experiment"),
        ("privacy/nested=local", "privacy/nested: unknown key"),
        ("privacy=local,local_sgd", "privacy=local,local_sgd.*several values"),
        ("privacy.rounds=1,2", "privacy.rounds=1,2.*several values"),
        ("privacy.rounds=range(1,3)", "privacy.rounds.*several values"),
        ("privacy=glob(*)", "privacy.*several values"),
        ("privacy.rounds=2.5", "privacy.rounds: .*integer.*found 2.5"),
        ("privacy.rounds=true", "privacy.rounds: .*found True"),
        ("privacy.rounds=null", "privacy.rounds: .*found None"),
        ("privacy.rounds='7'", "privacy.rounds: .*found '7'"),
        ("privacy.rounds={a: 1}", "privacy.rounds: "),
        ("privacy.rounds=", "privacy.rounds: "),
        ("privacy.rounds=0", "privacy.rounds: 0"),
        ("privacy.rounds=10001", "privacy.rounds: 10001"),
        ("privacy.target_epsilon=much", "privacy.target_epsilon: .*number.*found 'much'"),
        ("privacy.target_epsilon=-1", "privacy.target_epsilon: -1.0 must be above 0"),
        ("privacy.target_epsilon=inf", "privacy.target_epsilon: inf"),
        ("privacy.target_epsilon=nan", "privacy.target_epsilon: nan"),
        ("privacy.target_epsilon=1e999", "privacy.target_epsilon: inf"),
        (f"privacy.target_epsilon={'9' * 400}", "privacy.target_epsilon"),
        (f"privacy.target_epsilon={'9' * 5000}", "privacy.target_epsilon"),
        ("privacy.delta=1", "privacy.delta: 1.0 must be"),
        ("privacy.mode=distributed", "privacy.mode: comes with the option; choose one with privacy=distributed or"),
        ("privacy.mode=shuffled", "privacy.mode: comes with the option"),
        ("data.minimum_items=0", "data.minimum_items: 0"),
        ("model.backbone=resnet50", "model.backbone"),
        ("model.pooling=[median]", "model.pooling"),
        ("model.pooling=average", "model.pooling"),
        ("model.trainable=everything", "model.trainable"),
        ("model.trainable=adapter", "model.trainable: 'adapter' needs privacy.mode 'local_sgd'"),
        ("model.trainable=norms", "model.trainable: 'norms' needs privacy.mode 'local_sgd'"),
        ("model.trainable=network", "model.trainable: 'network' is not possible with backbone tf_efficientnet_lite0"),
        ("model.adapter_rank=0", "model.adapter_rank: 0; choose 1 to 256"),
        ("model.views=[]", "model.views: .*at least one"),
        ("model.views=[mirror]", "model.views"),
        ("model.views=[rotate_180]", "model.views: .*must begin with 'upright'"),
        ("model.views=[upright,upright]", "model.views: .*each once"),
        ("model=resnet10t_gn", "model.trainable: 'network' needs privacy.mode 'local_sgd'"),
        ("grading.labels=[good]", "grading.labels: 1 grades"),
        ("grading.labels.0=good", "grading.labels.0: unknown key"),
        ("grading.cost=[[0,1],[1,0]]", "grading.cost: must be 4 rows"),
        ("grading.labels=[???,b,c,d]", "grading.labels"),
        ("grading.critical=[broken]", "grading.critical: 'broken'"),
        ("aggregation.momentum=1", "aggregation.momentum: 1.0 must be"),
        ("name=A b", "name: 'A b' must be"),
        ("name=2026", "name: .*string.*found 2026"),
        ("name=???", r"name=\?\?\?.*no value at all"),
        ("name=[[[[", "name"),
        ("name=" + "[" * 5000, "name"),
        ("+privacy.rounds=5", r"\+privacy.rounds=5.*neither added nor deleted"),
        ("++privacy.rounds=5", r"\+\+privacy.rounds=5.*neither added nor deleted"),
        ("+x=1", r"\+x=1.*neither added nor deleted"),
        ("~privacy.rounds", "~privacy.rounds.*neither added nor deleted"),
        ("~privacy", "~privacy.*neither added nor deleted"),
        ("privacy@data=local", "privacy@data=local.*packages"),
        ("hydra.run.dir=/tmp", "hydra.run.dir=/tmp.*hydra's own settings"),
        ("hydra.searchpath=[file:///tmp]", "hydra.searchpath.*hydra's own settings"),
        ("hydra/launcher=basic", "hydra/launcher=basic.*hydra's own settings"),
        ("name=${oc.env:HOME}", "oc.env:HOME.*interpolations"),
        ("name='${now:%Y}'", "now.*interpolations"),
        ("name=a${hydra:runtime.cwd}", "hydra:runtime.*interpolations"),
        ("data.asset_type=${name}", "name.*interpolations"),
        ("privacy", "'privacy': not KEY=VALUE"),
        ("=local", "'=local': not KEY=VALUE"),
        ("", "not KEY=VALUE"),
        ("defaults=[]", "defaults: unknown key"),
        ("name=a\nb", "name"),
        ("--config-dir=/tmp", "config-dir"),
    ],
)
def test_a_bad_override_is_refused_with_one_line_that_names_it(override, naming):
    with pytest.raises(JobRefused, match=naming) as refused:
        compose_job([override])
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("key", ["privacy", "privacy.rounds"])
def test_a_key_that_is_given_twice_is_refused(key):
    with pytest.raises(JobRefused, match=f"{key}: given twice"):
        compose_job([f"{key}=1", f"{key}=2"])


@given(st.text(max_size=40))
def test_whatever_is_typed_gives_a_job_or_one_line(text):
    try:
        compose_job([text])
    except JobRefused as refused:
        assert len(str(refused).splitlines()) == 1  # noqa: PT017 - most texts are refused, and a few are not


def yaml_tree(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def test_the_groups_are_the_fields_of_a_job():
    chosen = {
        group: option
        for entry in yaml_tree(CONF / "job.yaml")["defaults"]
        if isinstance(entry, dict)
        for group, option in entry.items()
    }
    own = set(yaml_tree(CONF / "job.yaml")) - {"defaults"}
    assert (set(chosen) - {"experiment"}) | own == {field.name for field in fields(JobSpec)}
    assert set(groups()) == set(chosen)


def test_every_privacy_spec_has_an_option_of_its_own():
    union, _ = get_args(PrivacySpec)
    assert set(get_args(union)) == set(SPECS["privacy"])
    modes = {yaml_tree(CONF / "privacy" / f"{option}.yaml")["mode"] for option in groups()["privacy"]}
    assert modes == {field.default for spec in SPECS["privacy"] for field in fields(spec) if field.name == "mode"}


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_keys_of_a_file_and_fields_of_its_spec_are_the_same(path):
    tree = yaml_tree(path)
    if path.parent.name == "experiment":
        flat = {f"{group}.{key}" for group, values in tree.items() if isinstance(values, dict) for key in values}
        assert flat <= {f"{group}.{field.name}" for group in SPECS for spec in SPECS[group] for field in fields(spec)}
        return
    shapes = [{field.name for field in fields(spec)} for spec in SPECS[path.parent.name]]
    assert set(tree) in shapes


def test_no_spec_nests_another_so_that_one_group_is_one_spec():
    for spec in itertools.chain(*SPECS.values()):
        assert not any(is_dataclass(field.type) for field in fields(spec))


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_a_file_holds_values_and_says_what_each_means(path):
    text = path.read_text()
    assert "_target_" not in text
    assert "${" not in text
    assert text.startswith("# ")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        is_value = ":" in line.partition("#")[0] and not line.startswith(("#", "defaults:", "mode:"))
        is_group = line.rstrip().endswith(":") and path.parent.name == "experiment"
        if is_value and not is_group:
            assert "#" in line or lines[number - 1].lstrip().startswith("#"), line


def test_the_help_names_every_option_with_a_phrase_and_marks_the_defaults():
    text = describe()
    for group, options in groups().items():
        for option in options:
            (line,) = [line for line in text.splitlines() if f" {group}={option} " in f"{line} "]
            assert len(line.split(maxsplit=2)) == 3 or len(line.split(maxsplit=1)) == 2
    assert " * privacy=local " in text


def test_no_other_file_knows_hydra():
    root = CONF.parent
    knowing = set()
    for package in ("fedgrade", "clients", "server"):
        for path in (root / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                if any(name.partition(".")[0] in ("hydra", "omegaconf") for name in names):
                    knowing.add(path)
    assert knowing == {Path(configure.__file__)}


def test_composing_writes_nothing_changes_no_folder_and_sets_up_no_log(tmp_path):
    # A folder with a decoy conf/ and a .hydra to be tempted by; -I so that nothing is found by the current folder.
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "job.yaml").write_text("name: decoy\n")
    code = (
        "import logging, os\n"
        "from server.configure import compose_job\n"
        "before = os.getcwd()\n"
        "print(compose_job(['experiment=pilot']).name, os.getcwd() == before, logging.getLogger().handlers)\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout == "pilot True []\n"
    assert done.stderr == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["conf", "job.yaml"]
