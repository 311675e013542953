"""What the commands share: where they print, common options, and errors as one message."""

from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from halfbit.errors import GateError, HalfbitError, Unsupported

out, err = Console(), Console(stderr=True)

# seeds are 64-bit numbers
MOST = (1 << 63) - 1
Folder = Annotated[str, typer.Argument(help="Folder that halfbit compress wrote.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda where there is one.")]
Verified = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare what is loaded with the checksums of its manifest.")
]


def told(command: Callable[..., None]) -> Callable[..., None]:
    """Errors of the input become one message and exit code 2, without a traceback."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except HalfbitError as e:
            err.print(
                f"halfbit: {type(e).__name__}: {e}", style="bold red", markup=False, highlight=False, soft_wrap=True
            )
            raise typer.Exit(3 if isinstance(e, GateError) else 2) from None
        except KeyboardInterrupt:
            err.print(
                "halfbit: interrupted; the same command continues where it was",
                markup=False,
                soft_wrap=True,
            )
            raise typer.Exit(130) from None

    return run


def device_of(name: str) -> str:
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "auto") or (number and (kind != "cuda" or not number.isdecimal())):
        raise Unsupported(f"--device: expected cpu, cuda, cuda:NUMBER or auto, got {name!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise Unsupported(f"--device {name}: torch sees no CUDA device here; use --device cpu, or install a CUDA torch")
    if number and int(number) >= torch.cuda.device_count():
        raise Unsupported(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
