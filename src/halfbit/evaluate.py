"""How good a compressed model is: perplexity or span-corruption loss on a text, and its distance from the original.

Protocol: the text is tokenized as a whole without special tokens and cut into windows that do not overlap; the loss is
the mean cross-entropy over positions 2 to the end of each window, the perplexity its exponent. Encoder-decoder models:
every window is span-corrupted (15 % in spans of 3, a fixed seed) and the loss is the decoder's.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from halfbit.errors import CalibrationError, CheckpointError
from halfbit.manifest import unverified
from halfbit.samples import Sample, load_tokenizer, longest, read_text, samples_of, tokenize, windows
from halfbit.untrusted import STUMBLES, check_counts


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text; the last three only with an original to compare with."""

    loss: float
    perplexity: float
    tokens: int
    windows: int
    sequence_length: int
    seconds: float
    tokens_per_second: float
    kl_divergence: float | None = None
    """Mean KL(original || compressed) per token, in nats."""
    top1_agreement: float | None = None
    original_loss: float | None = None
    original_perplexity: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if v is not None}


def load(source: str, *, dtype: torch.dtype | None = None, device: str = "cpu", verify: bool = True) -> Any:
    """A model, compressed or not, in eval mode.

    Args:
        dtype: by default float32 on a CPU, else the checkpoint's.
        verify: compare every tensor of a compressed folder with its checksum; the rules of the formats hold always.
    """
    if not Path(source).exists() and "/" not in source:
        raise CheckpointError(f"{source}: no such folder; give a model folder or a hub id such as org/name")
    try:
        check_counts(PreTrainedConfig.get_config_dict(source)[0], f"{source}/config.json")
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        chosen: Any = dtype or (torch.float32 if device == "cpu" else config.dtype)
        with nullcontext() if verify else unverified():
            loaded: Any = auto.from_pretrained(source, dtype=chosen, output_loading_info=True, trust_remote_code=False)
    except (*STUMBLES, SafetensorError) as e:
        # transformers checks little of a config; whatever it stumbles over is the folder's fault
        raise CheckpointError(f"{source}: could not be loaded as a model: {e}") from e
    model, info = loaded
    # transformers only warns, and fills in random weights
    for name in sorted(info["missing_keys"]):
        raise CheckpointError(f"{source}: no file has the weight {name}; the folder is incomplete", tensor=name)
    return model.to(device).eval()


def evaluate(
    source: str,
    text: str,
    *,
    against: str | None = None,
    sequence_length: int = 0,
    max_tokens: int = 0,
    seed: int = 0,
    corruption: str = "t5",
    batch_tokens: int = 4096,
    device: str = "cpu",
    verify: bool = True,
) -> Evaluation:
    """Evaluate the model at `source` on a text file (or .jsonl, or data set name).

    Args:
        against: the original, for KL divergence and top-1 agreement.
        sequence_length: tokens per window; 0: the model's maximum, at most 2048.
        max_tokens: of the text's beginning; 0: all of it.
        seed, corruption: of the span corruption (encoder-decoder models only); "t5" or "fixed".
        verify: as of `load`, of both models.
    """
    model = load(source, device=device, verify=verify)
    original = load(against, device=device, verify=verify) if against else None
    length = sequence_length or longest(model.config)
    tokenizer = load_tokenizer(source)
    tokens = tokenize(tokenizer, read_text(text))
    if max_tokens:
        tokens = tokens[:max_tokens]
    if length < 2 or (model.config.is_encoder_decoder and length < 4):
        raise CalibrationError(f"--sequence-length {length}: too short to have anything to predict; give 4 or more")
    if len(tokens) < length:
        raise CalibrationError(
            f"{text}: has {len(tokens)} tokens, less than one window of {length}; give more text or a smaller "
            "--sequence-length"
        )
    rows = windows(tokens, len(tokens) // length, length, origin=text)
    samples = samples_of(rows, tokenizer, model.config, seed=seed, corruption=corruption, origin=text)
    # logits are float32, vocabulary wide, and there are some four such tensors: at most half a GiB each
    at_once = min(batch_tokens, (1 << 27) // model.config.get_text_config().vocab_size)
    return measure(model, samples, original=original, batch=max(1, at_once // length), device=device)


@torch.no_grad()
def measure(
    model: Any, samples: list[Sample], *, original: Any = None, batch: int = 16, device: str = "cpu"
) -> Evaluation:
    """Figures of `model` (and of `original` on the same samples) as the module's docstring defines them."""
    sums = {"loss": 0.0, "original": 0.0, "kl": 0.0, "same": 0.0}
    count, seconds = 0, 0.0
    for group in equal_shapes(samples, batch):
        begin = time.perf_counter()
        logits, labels = answers(model, group, device)
        seconds += time.perf_counter() - begin
        sums["loss"] += F.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
        if original is not None:
            reference, _ = answers(original, group, device)
            sums["original"] += F.cross_entropy(reference, labels, reduction="sum").item()
            p, q = reference.log_softmax(-1), logits.log_softmax(-1)
            sums["kl"] += F.kl_div(q, p, log_target=True, reduction="sum").item()
            sums["same"] += (reference.argmax(-1) == logits.argmax(-1)).sum().item()
    mean = {k: v / count for k, v in sums.items()}
    compared = {}
    if original is not None:
        compared = {
            "kl_divergence": mean["kl"],
            "top1_agreement": mean["same"],
            "original_loss": mean["original"],
            "original_perplexity": math.exp(min(mean["original"], 700.0)),
        }
    total = sum(len(s.ids) for s in samples)
    return Evaluation(
        loss=mean["loss"],
        perplexity=math.exp(min(mean["loss"], 700.0)),
        tokens=count,
        windows=len(samples),
        sequence_length=len(samples[0].ids),
        seconds=seconds,
        tokens_per_second=total / seconds,
        **compared,
    )


def equal_shapes(samples: list[Sample], batch: int) -> list[list[Sample]]:
    """Neighbours whose tensors can be stacked."""
    groups: list[list[Sample]] = []
    for sample in samples:
        last = groups[-1] if groups else None
        if last and len(last) < batch and _shape(last[0]) == _shape(sample):
            last.append(sample)
        else:
            groups.append([sample])
    return groups


def _shape(sample: Sample) -> tuple[int, int]:
    return len(sample.ids), 0 if sample.decoder_ids is None else len(sample.decoder_ids)


def answers(model: Any, group: list[Sample], device: str) -> tuple[Tensor, Tensor]:
    """float32 logits `[tokens, vocabulary]` and what they should say, int64 `[tokens]`."""
    ids = torch.stack([s.ids for s in group]).to(device)
    if group[0].decoder_ids is None:
        logits, labels = model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:]
    else:
        decoder = torch.stack([s.decoder_ids for s in group if s.decoder_ids is not None]).to(device)
        labels = torch.stack([s.labels for s in group if s.labels is not None]).to(device)
        logits = model(input_ids=ids, decoder_input_ids=decoder, use_cache=False).logits
    return logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1)
