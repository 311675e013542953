"""The demo: compress examples/tiny-moe, compare it with the original, and let it write. Nothing is downloaded."""

import shutil
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import halfbit
from halfbit import recipe
from halfbit.commands.progress import show_progress
from halfbit.compress import compress
from halfbit.samples import load_tokenizer

HERE = Path(__file__).parent
MODEL = HERE / "tiny-moe"
OUT = HERE.parent / "demo-output"
# perplexity over so many tokens of the test text
TEST_TOKENS = 20_480
PROMPTS = ("The old house at the end of the road", "She opened the letter and", "In the morning the ship")


def main() -> None:
    """Compress, measure, generate."""
    disable_progress_bar()
    console = Console()
    shutil.rmtree(OUT, ignore_errors=True)
    chosen = recipe.load("qmoe").calibrated(samples=128, sequence_length=256)
    begin = time.perf_counter()
    show_progress(compress(str(MODEL), OUT, chosen, str(MODEL / "calibration.txt")))
    seconds = time.perf_counter() - begin
    report = halfbit.inspect(OUT)

    figures = {}
    for name, folder in (("original", MODEL), ("compressed", OUT)):
        test = str(MODEL / "test.txt")
        figures[name] = halfbit.evaluate(str(folder), test, sequence_length=256, max_tokens=TEST_TOKENS)
    speed = {name: tokens_per_second(folder) for name, folder in (("original", MODEL), ("compressed", OUT))}

    table = Table("", "original", "compressed", title=f"tiny-moe by the recipe qmoe, {seconds:.0f} s")
    experts = report["parts"]["experts"]
    table.add_row("files, bytes", f"{folder_bytes(MODEL):,}", f"{folder_bytes(OUT):,}")
    table.add_row("experts, bytes", f"{2 * report['packed_weights']:,}", f"{experts['bytes']:,}")
    table.add_row("bits per expert weight, all included", "16", f"{report['bits_per_packed_weight']:.3f}")
    table.add_row("perplexity", *(f"{figures[n].perplexity:.2f}" for n in figures))
    table.add_row("tokens per second, reading", *(f"{figures[n].tokens_per_second:,.0f}" for n in figures))
    table.add_row("tokens per second, writing", *(f"{speed[n]:.0f}" for n in speed))
    console.print(table)

    console.print("\nwritten by the compressed model:", style="bold")
    for prompt in PROMPTS:
        console.print(f"[bold]{prompt}[/bold]{write(OUT, prompt, 40)}", highlight=False)
    console.print(f"\nthe compressed model lies in {OUT.name}; look at it with: .venv/bin/halfbit inspect {OUT.name}")


def folder_bytes(folder: Path) -> int:
    """Bytes of the weight files."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def write(folder: Path, prompt: str, tokens: int) -> str:
    """Greedy text after the prompt, with a little variety forced so that a model this small does not circle."""
    model, tokenizer = halfbit.load(str(folder)), load_tokenizer(str(folder))
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=tokens, do_sample=False, repetition_penalty=1.3)
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).replace("\n", " ")


def tokens_per_second(folder: Path, tokens: int = 64) -> float:
    """Of greedy generation, one sequence, the better of two runs."""
    model = halfbit.load(str(folder))
    ids = torch.arange(100, 116)[None]
    best = 0.0
    for _ in range(2):
        begin = time.perf_counter()
        model.generate(ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
        best = max(best, tokens / (time.perf_counter() - begin))
    return best


if __name__ == "__main__":
    sys.exit(main())
