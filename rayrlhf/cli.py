"""The command line. Exit codes: 0 done, 1 the run failed, 2 the input was refused."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from rayrlhf.importing import leave_process, quick_imports, take_over_process

__all__ = ["app", "main"]

app = typer.Typer(
    name="rayrlhf",
    help="Reinforcement learning from human feedback on Ray: from a laptop's CPU to a cluster of GPU nodes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

data_app = typer.Typer(help="Look at data before a run does.", no_args_is_help=True)
app.add_typer(data_app, name="data")

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML configuration.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
    typer.Argument(metavar="[key=value ...]", help="Keys that replace those of the file, such as ppo.steps=10."),
]


_TRAINING = "Interrupted. What was trained up to the last whole step is in the run's folder; go on with --resume."
_NOTHING_LEFT = "Interrupted: nothing was written but the log. The same command begins anew."
_GOES_ON = "Interrupted. The same command goes on where it stopped."


@contextmanager
def _told_plainly(interrupted: str = "Interrupted.") -> Iterator[None]:
    """Turn the two bad ends into a message and an exit code; anything else is a defect, and keeps its traceback.

    Args:
        interrupted: what is said after Ctrl-C.
    """
    from rayrlhf.errors import InputRefused, RunFailed

    try:
        yield
    except InputRefused as refused:
        count = len(refused.problems)
        nothing = "" if refused.started else ", nothing was started"
        _complain(f"Refused: {count} problem{'s' if count != 1 else ''}{nothing}.")
        for problem in refused.problems:
            _complain(f"  - {problem}")
        raise typer.Exit(2) from None
    except RunFailed as failed:
        _complain(f"The run failed: {failed}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        _complain(interrupted)
        raise typer.Exit(1) from None
    except OSError as failed:
        if failed.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _complain(f"The run failed: {failed.strerror}: {failed.filename or 'where its output goes'}")
        raise typer.Exit(1) from None


def _complain(text: str) -> None:
    print(text, file=sys.stderr)


@app.command()
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
) -> None:
    """Run the algorithm that a configuration names, here or on the Ray cluster of cluster.address."""
    with _told_plainly(_TRAINING):
        from rayrlhf.config import load_config

        loaded = load_config(config, overrides or [])
        _prepare_process(alone=loaded.cluster.executor == "inline")
        with quick_imports():
            from rayrlhf.drivers.train import train as run_training

        run_training(loaded, resume=resume)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document, in bytes and seconds.")] = False,
) -> None:
    """Show what a run will do, where its roles sit, what they hold and send, or a pipeline's stages. Starts nothing.

    Exit code 1 where it can't run as planned, with all reasons. Keys of --json: docs/plan.md.
    """
    with _told_plainly():
        import json

        from rich.console import Console

        from rayrlhf.config import load_config
        from rayrlhf.config.pipeline import is_pipeline, load_pipeline, pipeline_rows
        from rayrlhf.monitoring.plan import render_full_plan, render_plan
        from rayrlhf.planning.document import document
        from rayrlhf.planning.plan import make_plan

        if is_pipeline(config):
            rows = pipeline_rows(load_pipeline(config, overrides or []))
            if as_json:
                print(json.dumps({"algorithm": "pipeline", "stages": [row._asdict() for row in rows]}, indent=1))
            else:
                render_plan(rows, Console())
            return
        made = make_plan(load_config(config, overrides or []))
        if as_json:
            print(json.dumps(document(made), indent=1))
        else:
            render_full_plan(made, Console())
        if made.problems:
            raise typer.Exit(1)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, such as RUN/model, or hub name.")],
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="The prompt; may be given several times.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.01, help="Sampling temperature.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
    chat: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--chat/--plain", help="With or without the chat template. Default: as the run was trained."),
    ] = None,
) -> None:
    """Let a model answer prompts."""
    with _told_plainly():
        _prepare_process(alone=True)
        with quick_imports():
            from rayrlhf.drivers.generate import generate as run_generation

        texts = run_generation(model, prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, chat=chat)
        for question, text in zip(prompt, texts, strict=True):
            print(f"> {question}\n{text}\n" if len(prompt) > 1 else text)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs; several are compared.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--out", "-o", help="The file to write; by default report.html in the first run's folder."),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots", help="Write the plots as PNG files beside it too.")] = False,
) -> None:
    """Write one HTML file about runs, which opens without a network."""
    with _told_plainly():
        from rayrlhf.evaluation.report import write_report

        print(write_report(runs, out or runs[0] / "report.html", pngs=plots))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; it must not exist.")],
) -> None:
    """Write a run's model as one Hugging Face folder: adapters are merged, and checked against the unmerged model."""
    with _told_plainly():
        _prepare_process(alone=True)
        with quick_imports():
            from rayrlhf.drivers.export import export_model

        for line in export_model(run, out):
            print(line)


@app.command()
def sample(config: ConfigPath, overrides: Overrides = None) -> None:
    """Let a model answer prompts, score the responses, and write preference pairs, best-of-n examples, or all of them."""
    with _told_plainly(_NOTHING_LEFT):
        loaded = _loaded_for("sampling", config, overrides or [])
        with quick_imports():
            from rayrlhf.drivers.sample import sample_responses

        sample_responses(loaded)


@app.command()
def evaluate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Compare models on the same prompts: scores, win rates, KL, perplexity, variety, samples side by side."""
    with _told_plainly(_NOTHING_LEFT):
        loaded = _loaded_for("evaluation", config, overrides or [])
        with quick_imports():
            from rayrlhf.drivers.evaluate import evaluate_models

        evaluate_models(loaded)


@app.command()
def pipeline(
    config: ConfigPath,
    overrides: Overrides = None,
    redo: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--redo", metavar="STAGE", help="Do this stage again, and all that need it; may be repeated."),
    ] = None,
) -> None:
    """Run stages that feed each other, such as SFT, pairs, DPO and a comparison; the same command again goes on."""
    with _told_plainly(_GOES_ON):
        _prepare_process(alone=True)
        with quick_imports():
            from rayrlhf.config.pipeline import load_pipeline
            from rayrlhf.drivers.pipeline import run_pipeline
            from rayrlhf.drivers.pipeline_inputs import look

        run_pipeline(load_pipeline(config, overrides or [], look), redo=redo or [])


@app.command()
def critique(config: ConfigPath, overrides: Overrides = None) -> None:
    """Let a model criticise its own responses by principles and revise them, and write preference pairs."""
    with _told_plainly(_NOTHING_LEFT):
        loaded = _loaded_for("critique", config, overrides or [])
        with quick_imports():
            from rayrlhf.drivers.critique import critique_responses

        critique_responses(loaded)


@app.command()
def submit(
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(metavar="CONFIG", help="A YAML configuration."),
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, such as http://HEAD:8265."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    on_interrupt: Annotated[
        str, typer.Option(help="What Ctrl-C does to the job: ask, leave or stop. Without a terminal ask is leave.")
    ] = "ask",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Watch the job to its end.")] = True,
    env: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME[=VALUE]",
            help="Environment variable of the job and its roles; NAME alone takes its value here. Ray's dashboard knows it.",
        ),
    ] = None,
    stop_seconds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=1,
            help="What the job has to save its last whole step when it is stopped: as long as a checkpoint takes. Default: 60.",
        ),
    ] = None,
    follow: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="JOB", help="Watch a job that was submitted before; takes no CONFIG."),
    ] = None,
) -> None:
    """Run a configuration as a job of a Ray cluster: code, data files and configuration travel, the log comes back.

    Ends with the job's exit code. The folder in which the command is given travels, without what .gitignore and .rayignore
    name; files that the configuration names travel in any case. With token authentication RAY_AUTH_TOKEN or
    RAY_AUTH_TOKEN_PATH is set as for Ray's own commands.
    """
    with _told_plainly("Interrupted: no job was submitted."):
        from rayrlhf.drivers.submit_command import run_submit

        _prepare_process(alone=True)
        left = run_submit(
            config,
            overrides or [],
            address=address,
            resume=resume,
            on_interrupt=on_interrupt,
            wait=wait,
            env=env or [],
            follow=follow,
            stop_seconds=stop_seconds,
        )
        if left is not None:
            _complain(left)
            raise typer.Exit(1)


@data_app.command("check")
def data_check(
    what: Annotated[Path, typer.Argument(metavar="FILE_OR_CONFIG", help="A data file, or a configuration.")],
    overrides: Overrides = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--model", help="Model whose tokenizer and chat template are used with a file."),
    ] = None,
    reward_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--reward-model", help="Reward model whose scores say which pairs may be swapped."),
    ] = None,
    fix: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--fix", help="Write a copy without the rows that have errors; the original stays."),
    ] = None,
) -> None:
    """Say what is wrong with data, by file and line. Exit code 2 where a run would refuse them."""
    with _told_plainly():
        _prepare_process(alone=True)
        with quick_imports():
            from rayrlhf.drivers.data_check import check_data

        raise typer.Exit(check_data(what, overrides or [], model=model, reward_model=reward_model, fix_to=fix))


@app.command("serve-reward")
def serve_reward(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model's folder, such as RUN/model.")],
    host: Annotated[str, typer.Option(help="Address to listen at; others than this machine's own need a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8900,
    token_env: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Environment variable with the token that clients must send."),
    ] = None,
) -> None:
    """Serve a reward model over HTTP."""
    with _told_plainly():
        _prepare_process(alone=True)
        with quick_imports():
            from rayrlhf.drivers.serve import serve_reward_model

        serve_reward_model(model, host=host, port=port, token_env=token_env)


@app.command()
def doctor() -> None:
    """Show what is installed, what devices there are, what is missing, and the command that cures it."""
    _prepare_process(alone=True)
    from rayrlhf.doctor import examine

    raise typer.Exit(examine())


def _loaded_for(algorithm: str, config: Path, overrides: list[str]) -> Any:
    """A configuration that must be for this algorithm, and the process prepared for it."""
    from rayrlhf.config import load_config
    from rayrlhf.errors import InputRefused

    loaded = load_config(config, overrides)
    if loaded.algorithm != algorithm:
        raise InputRefused(f"algorithm: found {loaded.algorithm} in {config}; this command takes {algorithm}")
    _prepare_process(alone=loaded.cluster.executor == "inline")
    return loaded


def _prepare_process(*, alone: bool) -> None:
    """Settings that libraries read once, when they are imported; ``alone``: no process of ours beside this one."""
    # Reward functions of the user's own lie beside the configuration, in the folder where the command is given.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if not alone:
        # Idle OpenMP threads that spin slow every other process on the machine down. Alone, their spinning saves a sixth.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def main() -> None:
    """The console script. It ends the process: within a program of your own call `app`."""
    take_over_process()
    try:
        app()
    except SystemExit as end:
        if isinstance(end.code, int):
            leave_process(end.code)
        raise


if __name__ == "__main__":
    main()
