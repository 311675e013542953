"""Tiny random models, compressed and loaded: what the tests of whole models share, and the oracle they compare with.

The fixture `made` of conftest.py compresses each model once by each recipe that tests ask for.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from halfbit import recipe
from halfbit.compress import compress
from halfbit.events import Event
from halfbit.families import open_family
from halfbit.manifest import MANIFEST, text_of
from halfbit.nn import PackedEmbedding, PackedExperts, PackedLinear
from halfbit.reader import Reader
from halfbit.recipe import Recipe

EAGER = {"experts_implementation": "eager"}
WORDS = [f"w{i}" for i in range(40)]
# every way in which a tiny checkpoint is written, by what tests call it
SOURCES: dict[str, Callable[[Path], Path]] = {
    **{
        name: lambda folder, name=name: tiny_models.save(name, folder)
        for name in (tiny_models.CONFIGS | tiny_models.FILLED | tiny_models.NOTHING_ELSE)
    },
    **{
        f"{name} as built": lambda folder, name=name: tiny_models.save_as_built(name, folder)
        for name in tiny_models.CONFIGS
    },
    "gpt-oss mxfp4": tiny_models.save_mxfp4,
    "qwen3-moe fp8": tiny_models.save_fp8,
}

# every linear layer and embedding
EVERYTHING = {
    "grouped": """
        [[rules]]
        match = "*embed*"
        solver = "rtn"
        grid = { name = "affine", bits = 8, group = 16 }
        codec = { name = "grouped" }
        [[rules]]
        match = "*shared"
        solver = "rtn"
        grid = { name = "affine", bits = 8, group = 16 }
        codec = { name = "grouped" }
        [[rules]]
        match = "*"
        grid = { name = "affine", bits = 4, group = 8 }
        codec = { name = "grouped" }
        order = "act_order"
        [coverage]
        undersampled = "identity"
        """,
    "spqr": """
        [[rules]]
        match = "*embed*"
        solver = "rtn"
        grid = { name = "bilevel", bits = 8, group = 16, fitting = "min-max" }
        codec = { name = "spqr" }
        [[rules]]
        match = "*shared"
        solver = "rtn"
        grid = { name = "bilevel", bits = 8, group = 16, fitting = "min-max" }
        codec = { name = "spqr" }
        [[rules]]
        match = "*"
        grid = { name = "bilevel", bits = 3, group = 9, supergroup = 3, fitting = "min-max" }
        codec = { name = "spqr" }
        order = "act_order"
        tau = 0.5
        """,
}


def add_tokenizer(folder: Path) -> Path:
    """61 words, as many as the tiny models know; the special ones are 0, 1 and 2."""
    sentinels = [f"<extra_id_{i}>" for i in range(18)]
    vocabulary = {w: i for i, w in enumerate(["<pad>", "<bos>", "<eos>", *WORDS, *sentinels])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return folder


def text(folder: Path, words: int = 200) -> str:
    """A file of random words."""
    path = folder / "text.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=words)), "utf-8")
    return str(path)


def chosen(rules: str, samples: int = 6) -> Recipe:
    """A recipe, by name or written out, with few short samples; the finished model is left to the tests."""
    found = Recipe.from_toml(rules) if "[[rules]]" in rules else recipe.load(rules)
    return found.calibrated(samples=samples, sequence_length=12).gated(model=False)


def run(source: Path, out: Path, rules: str, changes: str = "", samples: int = 6) -> list[Event]:
    """Compress; `changes` is "this -> that" in the recipe's TOML."""
    found = chosen(rules, samples)
    if changes:
        before, after = changes.split(" -> ")
        found = Recipe.from_toml(found.to_toml().replace(before, after))
    return list(compress(str(source), out, found, text(source)))


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what the manifest says; its own checksum fits what it says then."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"]
    edit(manifest)
    (folder / MANIFEST).write_text(text_of(manifest))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    switch = "switch" in (folder / "config.json").read_text()
    auto: Any = AutoModelForSeq2SeqLM if switch else AutoModelForCausalLM
    # transformers' grouped_mm refuses rows that are no multiple of 16 bytes
    return auto.from_pretrained(folder, dtype=dtype, **({} if switch else EAGER)).eval()


def with_experts(source: Path, compressed: Any) -> Any:
    """The original model in float32 with the experts that the compressed one decodes to."""
    family = open_family(Reader(source))
    family.load_outer()
    for block in (b for part in family.stacks() for b in part.blocks):
        family.load_block(block)
    for path, stack in family.experts.items():
        packed = compressed.get_submodule(path)
        assert isinstance(packed, PackedExperts)
        dense = {}
        for matrix, projections in (
            (packed.matrix(packed._up), stack.up),
            (packed.matrix(packed._down), (stack.down,)),
        ):
            experts, out, columns = matrix.shape
            whole = matrix.codec.decode(matrix.packed()).view(experts, out, columns)
            sizes = [stack.projections[p][0] for p in projections]
            dense |= dict(zip(projections, whole.split(sizes, dim=1), strict=True))
        for projection, weight in dense.items():
            if stack.members:
                for name, w in zip(stack.parameters(projection), weight, strict=True):
                    family._place(name, w.contiguous())
            else:
                family._place(stack.parameters(projection)[0], (weight.mT if stack.transposed else weight).contiguous())
        biases = family.expert_biases(stack, 0, stack.num_experts)
        for projection, bias in biases.items():
            name = stack.bias_parameter(projection)
            assert name is not None
            family._place(name, bias.float())
    if "switch" not in family.config.model_type:
        family.model.set_experts_implementation("eager")
    return family.model


def decoded(source: Path, compressed: Any) -> Any:
    """The original model in float32 with what every packed module decodes to."""
    model = with_experts(source, compressed)
    for path, module in compressed.named_modules():
        if isinstance(module, PackedLinear | PackedEmbedding):
            weight = module.matrix.codec.decode(module.matrix.packed())
            model.get_submodule(path).weight.data.copy_(weight)
    return model


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 43, (2, 11), generator=torch.Generator().manual_seed(1))
    return (
        {"input_ids": ids, "decoder_input_ids": ids[:, :7]} if model.config.is_encoder_decoder else {"input_ids": ids}
    )


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the scale of `b`."""
    return float((a - b).abs().max() / b.abs().max())


@dataclass(frozen=True)
class Made:
    """A model that was compressed. Models are loaded once for all tests, which leave them as they are."""

    source: Path
    folder: Path
    events: list[Event]

    @cached_property
    def model(self) -> Any:
        """The compressed model in float32."""
        return load(self.folder)

    @cached_property
    def decoded(self) -> Any:
        """The oracle in float32."""
        return decoded(self.source, self.model)

    @cached_property
    def logits(self) -> Tensor:
        """Of the oracle, for `inputs`."""
        with torch.no_grad():
            return self.decoded(**inputs(self.decoded), use_cache=False).logits
