"""A pipeline's file: named stages, each with the configuration of one algorithm, where ``stage:NAME`` is an output."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Literal, cast

from pydantic import ConfigDict

from rayrlhf.config.base import ClusterConfig, JobConfig
from rayrlhf.config.choosing import PIPELINE
from rayrlhf.config.derive import PlanRow
from rayrlhf.config.jobs import CritiqueConfig, ModelEvaluationConfig, SamplingConfig
from rayrlhf.config.load import check_tree, in_order, is_text
from rayrlhf.config.offline import ExampleSource, PreferenceConfig, RewardModelConfig, SFTConfig
from rayrlhf.config.pipeline_stages import Draft, drafts, link, path_leaves
from rayrlhf.config.roots import DEFAULT, ROOTS, AnyConfig
from rayrlhf.config.rulebook import score_sources
from rayrlhf.config.source import Node, Place, Problem, apply_overrides, read_file
from rayrlhf.config.trainers import Positive
from rayrlhf.config.wording import shown
from rayrlhf.errors import InputRefused

__all__ = ["COMMANDS", "Pipeline", "PipelineConfig", "Stage", "is_pipeline", "load_pipeline", "pipeline_rows"]

LANGUAGE, REWARD, DATA = "a language model", "a reward model", "data"
EITHER = "a model"
FILE = "a file"
FUNCTION = "a function"
COMMANDS = {"sampling": "sample", "critique": "critique", "evaluation": "evaluate"}
"""By algorithm; for all others it is ``train``."""


class PipelineConfig(JobConfig):
    """What a pipeline has besides its stages."""

    model_config = ConfigDict(title="rayrlhf configuration of a pipeline")

    algorithm: Literal["pipeline"]
    """Stages that feed each other."""
    parallel_stages: Positive = 1
    """Stages that may run at the same time, where they don't need each other."""
    gates: Literal["stop", "note"] = "stop"
    """What a preference stage does whose quality gate isn't passed: ``stop`` what needs it, or ``note`` it at the end and
    go on with its model."""
    cluster: ClusterConfig = ClusterConfig()
    """Where the roles of each stage run; keys of a stage's own section ``cluster`` go before these."""


@dataclass(frozen=True)
class Stage:
    """A stage, resolved: paths stand where references stood."""

    name: str
    config: AnyConfig
    inputs: dict[str, str]
    """Which stage's output stands at which key."""

    @property
    def needs(self) -> list[str]:
        """The stages whose output it takes."""
        return list(dict.fromkeys(self.inputs.values()))

    @property
    def folder(self) -> FilePath:
        return FilePath(self.config.run_dir)

    @property
    def output(self) -> FilePath | None:
        """What other stages can take; None of an evaluation."""
        name = {DATA: "data.jsonl", LANGUAGE: "model", REWARD: "model"}.get(_gives(self.config) or "")
        return None if name is None else self.folder / name

    @property
    def product(self) -> FilePath:
        """What shows that it has run, and that nothing was changed since: its output, or the results of an evaluation."""
        return self.output or self.folder / "evaluation.json"


@dataclass(frozen=True)
class Pipeline:
    """A pipeline whose configuration was checked as a whole."""

    config: PipelineConfig
    stages: list[Stage]
    """In an order in which each comes after those that it needs."""


Look = Callable[[str, str], str | None]
"""Given what is wanted (`LANGUAGE`, `REWARD`, `EITHER`, `DATA`, `FILE`, `FUNCTION`) and its name in the file: what is wrong
with it in the world outside, or None."""


def is_pipeline(path: str | FilePath) -> bool:
    """Whether a file names the algorithm ``pipeline``.

    Raises:
        InputRefused: where the file can't be read.
    """
    node = read_file(path, []).value.get("algorithm")
    return node is not None and node.value == PIPELINE


def load_pipeline(path: str | FilePath, overrides: Sequence[str] = (), look: Look | None = None) -> Pipeline:
    """Read a pipeline's file, and check each stage as `rayrlhf.config.load_config` would, and how they fit together.

    Args:
        path: the YAML file.
        overrides: ``key=value``, such as ``stages.dpo.dpo.beta=0.2``.
        look: is asked for each model, file and function that isn't another stage's output.

    Raises:
        InputRefused: with every problem of the file, the overrides and the stages.
    """
    problems: list[Problem] = []
    file = Place(str(path))
    tree = read_file(path, problems)
    given = _stage_keys(tree)
    apply_overrides(tree, list(overrides), _is_text, problems)
    _refuse_other_commands(tree, file)
    section = _stages_section(tree, file, problems)
    outer = [p for p in problems if not p.key.startswith("stages")]
    config = cast(PipelineConfig | None, check_tree(tree, file, outer, PipelineConfig))
    problems += [p for p in outer if p not in problems]
    found, aliases = drafts(section, given, problems) if section is not None else ([], {})
    stages = _stages(tree, found, aliases, problems, look)
    if config is None or problems:
        raise InputRefused([str(problem) for problem in in_order(problems, str(path))])
    return Pipeline(config, _sorted(stages))


def pipeline_rows(pipeline: Pipeline) -> list[PlanRow]:
    """The stages in their order, with what each gives and needs."""
    rows = []
    for stage in pipeline.stages:
        needs = f"after {', '.join(stage.needs)}" if stage.needs else "needs no other stage"
        output = "a report" if stage.output is None else f"{stage.name}/{stage.output.name}"
        rows.append(PlanRow("stages", f"{stage.name} ({stage.config.algorithm})", output, needs))
    return rows


# -- the file ---------------------------------------------------------------------------------------------------


def _refuse_other_commands(tree: Node, file: Place) -> None:
    """Refuse a file of one run at once: all else that could be said of it as a pipeline is beside the point."""
    node = tree.value.get("algorithm")
    if node is None and "policy" in tree.value and "stages" not in tree.value:
        place, found, name = file, "is missing, which stands for ppo", DEFAULT
    elif node is not None and isinstance(node.value, str) and node.value in ROOTS:
        place, found, name = node.place, f"found {node.value}", node.value
    else:
        return
    command = f"rayrlhf {COMMANDS.get(name, 'train')} CONFIG"
    text = f"{found}; legal: {PIPELINE}; the command for {name} is {command}"
    raise InputRefused(str(Problem(place, "algorithm", text)))


def _stage_keys(tree: Node) -> list[str]:
    """Dotted keys of all stages, those in repetitions too, as far as the tree has that form."""
    keys = []
    outer = tree.value.get("stages")
    for name, node in outer.value.items() if outer is not None and isinstance(outer.value, dict) else ():
        keys.append(f"stages.{name}")
        inner = node.value.get("stages") if isinstance(node.value, dict) else None
        if inner is not None and isinstance(inner.value, dict):
            keys += [f"stages.{name}.stages.{other}" for other in inner.value]
    return keys


def _is_text(path: tuple[str, ...]) -> bool:
    """Whether an override's value is a text: as at the same key of a stage's own file."""
    rest = path
    while len(rest) > 2 and rest[0] == "stages":
        rest = rest[2:]
    return rest != path and rest[0] == "start" or is_text(rest)


def _stages_section(tree: Node, file: Place, problems: list[Problem]) -> Node | None:
    """The section ``stages``, taken out of the tree."""
    if "stages" not in tree.value:
        others = [key for key in tree.value if key not in PipelineConfig.model_fields]
        close = difflib.get_close_matches("stages", others, 1, 0.7)
        if not close:
            text = "is missing; legal: a section with the stages, each under its name"
            problems.append(Problem(file, "stages", text))
            return None
        problems.append(Problem(tree.value[close[0]].place, close[0], "there is no such key; did you mean stages?"))
        tree.value["stages"] = tree.value.pop(close[0])
    section: Node = tree.value.pop("stages")
    if isinstance(section.value, dict) and section.value:
        return section
    text = f"found {shown(section)}; legal: a section with at least one stage under its name"
    problems.append(Problem(section.place, "stages", text))
    return None


# -- stages -----------------------------------------------------------------------------------------------------


def _stages(
    tree: Node, found: list[Draft], aliases: dict[str, str], problems: list[Problem], look: Look | None
) -> list[Stage]:
    """The stages as far as they can be made, in the file's order; all that is wrong is added to the problems."""
    run_dir = tree.value.get("run_dir")
    top = FilePath(run_dir.value if run_dir is not None and isinstance(run_dir.value, str) else "run_dir")
    names = [draft.name for draft in found]
    outputs = {draft.name: top / draft.name / _output_of(draft.node) for draft in found}
    stages = []
    for draft in found:
        outside = [(path, node) for path, node in path_leaves(draft.node) if not _refers(node)]
        link(draft, names, aliases, outputs, problems)
        config = _checked(draft, tree, top, problems)
        if config is None:
            continue
        stages.append(Stage(draft.name, config, draft.inputs))
        if look is not None:
            _look_outside(draft, config, outside, look, problems)
    made = {stage.name: stage for stage in stages}
    for draft in found:
        if draft.name in made:
            _check_inputs(draft, made[draft.name], made, problems)
    _check_order(found, problems)
    return stages


def _refers(node: Node) -> bool:
    return str(node.value).startswith(("stage:", "previous:"))


def _output_of(node: Node) -> str:
    algorithm = node.value.get("algorithm")
    return "data.jsonl" if algorithm is not None and algorithm.value in ("sampling", "critique") else "model"


def _checked(draft: Draft, tree: Node, top: FilePath, problems: list[Problem]) -> AnyConfig | None:
    """A stage's configuration by its own class and rules, with what it has from the pipeline."""
    keys = draft.node.value
    if "run_dir" in keys:
        text = f"found {shown(keys['run_dir'])}; a stage's folder is {top / draft.name}: leave it out"
        problems.append(Problem(keys["run_dir"].place, f"{draft.key}.run_dir", text))
    keys["run_dir"] = Node(str(top / draft.name), draft.node.place, str(top / draft.name))
    seed = keys.get("seed", tree.value.get("seed"))
    if seed is not None:
        # Each round has a seed of its own: with one seed, two rounds would draw the same samples from one model.
        more = draft.round or 0
        keys["seed"] = Node(seed.value + more, seed.place, seed.text) if type(seed.value) is int else seed
    elif draft.round:
        keys["seed"] = Node(draft.round, draft.node.place, str(draft.round))
    cluster = tree.value.get("cluster")
    own = keys.get("cluster")
    if cluster is not None and isinstance(cluster.value, dict):
        if own is None:
            keys["cluster"] = cluster
        elif isinstance(own.value, dict):
            keys["cluster"] = Node({**cluster.value, **own.value}, own.place)
    before = f"{draft.key}."
    mine = [Problem(p.place, p.key.removeprefix(before), p.text) for p in problems if p.key.startswith(before)]
    known = len(mine)
    config = check_tree(draft.node, draft.node.place, mine)
    for problem in mine[known:]:
        first, _, rest = problem.key.partition(".")
        of_pipeline = first == "seed" and seed is tree.value.get("seed") and not draft.round
        of_pipeline |= first == "cluster" and (own is None or bool(rest) and rest not in own.value)
        moved = Problem(problem.place, problem.key if of_pipeline else f"{before}{problem.key}", problem.text)
        if moved not in problems:
            problems.append(moved)
    return config


def _look_outside(
    draft: Draft, config: AnyConfig, leaves: Iterable[tuple[tuple[str, ...], Node]], look: Look, problems: list[Problem]
) -> None:
    """Ask for each model, file and function that comes from outside of the pipeline."""
    asked = [(".".join(path), node.place, _wanted(".".join(path), config), node.value) for path, node in leaves]
    for source, key in score_sources(config, type(config)):
        if source.function is not None:
            asked.append((f"{key}.function", _place(draft.node, f"{key}.function"), FUNCTION, source.function))
    for name, node in draft.before.items() if draft.round == 1 else ():
        if not _refers(node):
            block = draft.key.rpartition(".stages.")[0]
            asked.append((f"{block}.start.{name}", node.place, EITHER, node.value))
    for key, place, wanted, value in asked:
        text = look(wanted, value)
        full = key if key.startswith("stages.") else f"{draft.key}.{key}"
        if text is not None and not any(p.key == full for p in problems):
            problems.append(Problem(place, full, text))


def _place(node: Node, key: str) -> Place:
    for part in key.split("."):
        value = node.value
        found = value[int(part)] if isinstance(value, list) else value.get(part) if isinstance(value, dict) else None
        if found is None:
            return node.place
        node = found
    return node.place


# -- how they fit together --------------------------------------------------------------------------------------


def _gives(config: AnyConfig) -> str | None:
    if isinstance(config, ModelEvaluationConfig):
        return None
    if isinstance(config, RewardModelConfig):
        return REWARD
    return DATA if isinstance(config, SamplingConfig | CritiqueConfig) else LANGUAGE


def _wanted(key: str, config: AnyConfig) -> str:
    """What may stand at a key."""
    section, _, rest = key.partition(".")
    last = key.rpartition(".")[2]
    if section == "data":
        return DATA
    if last in ("chat_template", "prompt") or section in ("critique", "judge"):
        return FILE
    if last == "model":
        return REWARD
    either = last == "tokenizer" or section == "critic"
    if either or section == "policy" and rest == "path" and isinstance(config, RewardModelConfig):
        return EITHER
    return LANGUAGE


def _columns(config: AnyConfig) -> set[str]:
    """The columns of what a stage writes."""
    form = config.sampling.form if isinstance(config, SamplingConfig) else "pairs"
    own = {"pairs": {"chosen", "rejected"}, "best": {"completion", "score"}, "all": {"response", "score"}}[form]
    return {"prompt"} | own | ({"margin"} if isinstance(config, SamplingConfig) and form == "pairs" else set())


def _read_columns(key: str, config: AnyConfig) -> set[str]:
    """The columns that a stage can't do without in the data at one of its keys."""
    if not isinstance(config, SFTConfig | RewardModelConfig | PreferenceConfig):
        more = getattr(config.data, "response_column", None) or getattr(config.data, "completion_column", None)
        return {config.data.prompt_column} | ({more} if more else set())
    _, name, *index = key.split(".")
    given = getattr(config.data, name)
    source = given[int(index[0])] if index and isinstance(given, list) else ExampleSource(path="-")
    if isinstance(config, SFTConfig):
        return {source.prompt_column, source.completion_column}
    if isinstance(config, PreferenceConfig) and config.dpo.loss == "kto":
        return {source.prompt_column, source.completion_column, source.label_column}
    return {source.chosen_column, source.rejected_column}


def _check_inputs(draft: Draft, stage: Stage, made: dict[str, Stage], problems: list[Problem]) -> None:
    """Every input is of the kind that its key takes."""
    for key, name in stage.inputs.items():
        if name not in made:
            continue
        source = made[name].config
        gives, wanted = _gives(source), _wanted(key, stage.config)
        text = None
        if gives != wanted and not (wanted == EITHER and gives in (LANGUAGE, REWARD)):
            gift = f"gives {gives}" if gives else "gives nothing that a stage could take"
            text = f"found stage:{name} ({source.algorithm}), which {gift}; {wanted} is wanted here"
        elif gives == DATA and (lacking := _read_columns(key, stage.config) - _columns(source)):
            text = f"found stage:{name}, which writes the columns {', '.join(sorted(_columns(source)))}; here "
            text += f"{', '.join(sorted(lacking))} {'is' if len(lacking) == 1 else 'are'} read too"
        elif gives == LANGUAGE and _adapter_alone(source):
            text = f"found stage:{name}, which gives adapters alone; legal: policy.lora.save merged in that stage"
        if text is not None:
            problems.append(Problem(_place(draft.node, key), f"{draft.key}.{key}", text))


def _adapter_alone(config: AnyConfig) -> bool:
    lora = getattr(getattr(config, "policy", None), "lora", None)
    return lora is not None and lora.save == "adapter"


def _check_order(found: list[Draft], problems: list[Problem]) -> None:
    """No stage needs itself, at once or through others. Of circles that share a stage the shortest is told,
    and none that a reference closes which is wrong for another reason."""
    wrong = {problem.key for problem in problems}
    needs = {
        draft.name: [name for key, name in draft.inputs.items() if f"{draft.key}.{key}" not in wrong] for draft in found
    }
    circles = [(draft, circle) for draft in found if (circle := _circle(draft.name, needs)) is not None]
    told: set[str] = set()
    for draft, circle in sorted(circles, key=lambda one: len(one[1])):
        if told & set(circle):
            continue
        told.update(circle)
        key = next(key for key, name in draft.inputs.items() if name == [*circle, draft.name][1])
        text = f"the stages need each other in a circle: {' needs '.join([*circle, draft.name])}"
        problems.append(Problem(_place(draft.node, key), f"{draft.key}.{key}", text))


def _circle(start: str, needs: dict[str, list[str]]) -> list[str] | None:
    """The shortest way from a stage back to itself."""
    ways = [[start]]
    seen: set[str] = set()
    while ways:
        way = ways.pop(0)
        for name in needs.get(way[-1], []):
            if name == start:
                return way
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return None


def _sorted(stages: list[Stage]) -> list[Stage]:
    """Each after those that it needs, else in the file's order."""
    done: list[Stage] = []
    left = list(stages)
    while left:
        names = {stage.name for stage in done}
        ready = next(stage for stage in left if set(stage.needs) <= names)
        done.append(ready)
        left.remove(ready)
    return done
