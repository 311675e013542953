"""The command line: compress, plan, import, repack, eval, generate, inspect, verify, bench. It parses, calls, shows.

Results go to stdout (as tables, or as JSON with --json), progress and messages to stderr. Exit codes: 0 done, 1 verify
found damage or bench a wrong product, 2 the input is at fault, 3 a gate stopped the run. See `commands/`.
"""

import typer
from transformers.utils.logging import disable_progress_bar

from halfbit import native
from halfbit.commands.bench import bench_command
from halfbit.commands.compress import compress
from halfbit.commands.convert import import_command, repack_command
from halfbit.commands.inspect import inspect, verify
from halfbit.commands.plan import plan
from halfbit.commands.run import evaluate_command, generate

app = typer.Typer(
    help="Compress large language models until they fit the hardware you have, and run them compressed.",
    epilog="First steps: halfbit compress MODEL OUT --calibration TEXT, then halfbit generate OUT --prompt 'Once'.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# in the order of the help
app.command("compress")(compress)
app.command("plan")(plan)
app.command("import")(import_command)
app.command("repack")(repack_command)
app.command("eval")(evaluate_command)
app.command("generate")(generate)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("bench")(bench_command)


def main() -> None:
    native.ask_for_same_sums()
    # the bars of transformers would run through ours
    disable_progress_bar()
    app()


if __name__ == "__main__":
    main()
