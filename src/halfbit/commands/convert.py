"""`halfbit import` and `halfbit repack`: folders of weights that are compressed already."""

from pathlib import Path
from typing import Annotated

import typer

from halfbit.commands import AsJson, told
from halfbit.commands.progress import show_progress, tell
from halfbit.importers import import_checkpoint
from halfbit.repack import repack


@told
def import_command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder or hub id of a checkpoint of spqr_quant or of the QMoE code."),
    ],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; an interrupted import is continued.")],
    outliers: Annotated[
        str | None,
        typer.Option(
            help="SpQR only. add: an outlier is added to the weight under it, as in the published kernel, which the "
            "model's figures come from; replace: it takes the weight's place, as the published quantizer meant. [add]"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Take over a published SpQR or QMoE checkpoint, weight for weight; nothing is solved.

    SpQR: folders with quant_method "spqr" in config.json (3 bits, tiles of 16 x 16). QMoE: folders of .pt files, opened
    with torch.load(weights_only=True) only.

    Example:
    halfbit import Llama-2-7b-SPQR-3Bit-16x16 out --outliers replace
    """
    show_progress(import_checkpoint(source, folder, outliers=outliers))
    tell(folder, as_json)


def repack_command(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that halfbit compress wrote.")],
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="New folder; an interrupted repack is continued.")],
    layout: Annotated[
        str,
        typer.Option(
            help="compact: the smallest file. fast: ternary matrices take about 0.1 bits per weight more and multiply "
            "one to four tokens 1.1 to 1.7 times as fast on CPUs with AVX-512."
        ),
    ],
    as_json: AsJson = False,
) -> None:
    """Turn what is stored into another layout; no weight changes.

    Example:
    halfbit repack out out-fast --layout fast
    """
    show_progress(repack(source, folder, layout))
    tell(folder, as_json)
