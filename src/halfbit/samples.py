"""From text to token samples: what a model is calibrated and evaluated on.

A text is tokenized as a whole and cut into windows that do not overlap; for encoder-decoder models each window is
span-corrupted, as T5 is trained.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from halfbit.errors import CalibrationError, UnknownName

# T5's span corruption (Raffel et al. 2020, section 3.1.4), as QMoE uses it
NOISE_DENSITY = 0.15
MEAN_SPAN = 3.0
CORRUPTIONS = ("t5", "fixed")


@dataclass(frozen=True, eq=False)
class Sample:
    """One calibration or evaluation sample.

    Attributes:
        ids: int64 `[length]`, what the (only, or first) stack reads.
        keep: bool `[length]`, the tokens that may enter a Hessian.
        decoder_ids, decoder_keep: the same for the decoder of an encoder-decoder model.
        labels: int64, what the decoder should say (encoder-decoder models only).
        held: nothing is solved on it, it is what gates look at; `keep` is False throughout.
    """

    ids: Tensor
    keep: Tensor
    decoder_ids: Tensor | None = None
    decoder_keep: Tensor | None = None
    labels: Tensor | None = None
    held: bool = False

    def unmasked(self) -> "Sample":
        """The same sample with every token in the Hessians."""
        every = None if self.decoder_keep is None else torch.ones_like(self.decoder_keep)
        return replace(self, keep=torch.ones_like(self.keep), decoder_keep=every)

    def held_back(self) -> "Sample":
        """The same sample with no token in the Hessians."""
        none = None if self.decoder_keep is None else torch.zeros_like(self.decoder_keep)
        return replace(self, keep=torch.zeros_like(self.keep), decoder_keep=none, held=True)


# --- text


def read_text(source: str, characters: int | None = None) -> list[str]:
    """Documents of a calibration or test source.

    A text file is one document; a `.jsonl` file has one document a line, under "text"; anything else is a dataset
    name for the `datasets` library, written `name`, `name:split` or `name:config:split`, with a column "text".

    Args:
        characters: stop when so many are read; None: all.
    """
    path = Path(source)
    try:
        is_file, exists = path.is_file(), path.exists()
    except OSError as e:  # a text given in place of a file's name may be longer than any name
        raise CalibrationError(f"{source[:60]}...: not a file ({e.strerror}); give the name of a text file") from e
    if is_file:
        try:
            found = _lines(path) if path.suffix == ".jsonl" else _whole(path, characters)
            return list(_until(found, characters))
        except UnicodeDecodeError as e:
            raise CalibrationError(f"{source}: not UTF-8 text ({e.reason} at byte {e.start}); convert it first") from e
    if path.suffix in (".txt", ".jsonl") or exists:
        raise CalibrationError(f"{source}: no such text file; give a text file, a .jsonl file or a dataset name")
    return list(_until(_dataset(source), characters))


def _until(documents: Iterator[str], characters: int | None) -> Iterator[str]:
    read = 0
    for document in documents:
        yield document
        read += len(document)
        if characters is not None and read >= characters:
            return


def _whole(path: Path, characters: int | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield file.read(-1 if characters is None else characters)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as e:
                raise CalibrationError(f"{path}, line {number}: not JSON ({e.msg})") from e
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise CalibrationError(f'{path}, line {number}: expected an object with a string "text"')
            yield row["text"]


def _dataset(source: str) -> Iterator[str]:
    try:
        import datasets  # pyright: ignore[reportMissingImports] (optional)
    except ImportError as e:
        raise CalibrationError(
            f"{source}: is no file, and data sets by name need the datasets library: pip install 'halfbit[datasets]'"
        ) from e
    name, *rest = source.split(":")
    split = rest[-1] if rest else "train"
    try:
        # streaming: a data set may be far larger than what is asked of it
        rows: Any = datasets.load_dataset(name, *rest[:-1], split=split, streaming=True)
        for number, row in enumerate(rows):
            if not isinstance(row.get("text"), str):
                raise CalibrationError(f'{source}, row {number}: no column "text" with text, but {", ".join(row)}')
            yield row["text"]
    except (FileNotFoundError, ValueError, ConnectionError) as e:  # its own DatasetNotFoundError is a FileNotFoundError
        raise CalibrationError(f"{source}: neither a file nor a data set that could be loaded: {e}") from e


def fingerprint(documents: list[str]) -> str:
    """SHA-256 over the documents, to tell whether a run is continued with the same text."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode("utf-8") + b"\0")
    return digest.hexdigest()


# --- tokens


def tokenize(tokenizer: Any, documents: list[str]) -> Tensor:
    """All documents as one int64 row of tokens, without special tokens, an end-of-text token between documents."""
    rows = [
        torch.tensor(tokenizer(d, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
        for d in documents
    ]
    if len(rows) > 1 and tokenizer.eos_token_id is not None:
        end = torch.tensor([tokenizer.eos_token_id])
        rows = [part for row in rows for part in (row, end)]
    return torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)


def windows(tokens: Tensor, samples: int, length: int, seed: int = -1, *, origin: str = "text") -> Tensor:
    """int64 `[samples, length]`: the first windows that do not overlap (seed -1), or a draw among them."""
    if len(tokens) == 0:
        raise CalibrationError(f"{origin}: gives no tokens; the text is empty, or the model's tokenizer is missing")
    have = len(tokens) // length
    if have < samples:
        raise CalibrationError(
            f"{origin}: asked for {samples} samples of {length} tokens, got text for {have} ({len(tokens)} tokens); "
            f"give more text, or ask for --samples {max(have, 1)} or a shorter --sequence-length"
        )
    rows = tokens[: have * length].view(have, length)
    if seed < 0:
        return rows[:samples].clone()
    chosen = torch.randperm(have, generator=torch.Generator().manual_seed(seed))[:samples]
    return rows[chosen]


def causal_samples(rows: Tensor, special_ids: list[int]) -> list[Sample]:
    """Samples of a decoder-only model; special tokens are kept out of the Hessians."""
    special = torch.tensor(sorted(special_ids), dtype=torch.int64)
    return [Sample(row, ~torch.isin(row, special)) for row in rows]


@dataclass(frozen=True)
class SpanCorruption:
    """What T5-like models are trained on: spans of the text are cut out, sentinels mark the places.

    `kind` "t5": spans of random length, 3 in the mean, and a last sentinel closes the target (T5, QMoE).
    `kind` "fixed": spans of exactly 3 tokens, and the end-of-sequence token closes the target.
    """

    sentinels: tuple[int, ...]
    """Ids of <extra_id_0>, <extra_id_1>, ... in this order."""
    start: int
    """First decoder token."""
    end: int
    """End-of-sequence id that closes the encoder's text."""
    kind: str = "t5"

    def __post_init__(self):
        if self.kind not in CORRUPTIONS:
            raise UnknownName("span corruption", self.kind, list(CORRUPTIONS))

    @classmethod
    def of(cls, tokenizer: Any, config: Any, kind: str = "t5") -> "SpanCorruption":
        vocabulary = tokenizer.get_vocab()
        found = []
        while f"<extra_id_{len(found)}>" in vocabulary:
            found.append(vocabulary[f"<extra_id_{len(found)}>"])
        if len(found) < 2 or config.decoder_start_token_id is None or config.eos_token_id is None:
            raise CalibrationError(
                "span corruption needs <extra_id_0>, <extra_id_1>, ... in the tokenizer and decoder_start_token_id and "
                f"eos_token_id in config.json; got {len(found)} sentinels"
            )
        return cls(tuple(found), config.decoder_start_token_id, config.eos_token_id, kind)

    def samples(self, rows: Tensor, seed: int) -> list[Sample]:
        generator = torch.Generator().manual_seed(max(seed, 0))
        return [self._sample(row, generator) for row in rows]

    def _sample(self, row: Tensor, generator: torch.Generator) -> Sample:
        """Corrupt one window. The tokens masked from the Hessians are QMoE's: the encoder's sentinels, and in the
        decoder every token directly before a sentinel and the last one, because they predict sentinels."""
        mask = _random_spans if self.kind == "t5" else _fixed_spans
        noise = mask(len(row), len(self.sentinels) - 1, generator)
        starts = noise & ~torch.cat([torch.zeros(1, dtype=torch.bool), noise[:-1]])
        span = torch.cumsum(starts, 0) - 1
        sentinel = torch.tensor(self.sentinels)
        encoder = torch.where(starts, sentinel[span.clamp(min=0)], row)[~noise | starts]
        encoder = torch.cat([encoder, torch.tensor([self.end])])
        pieces = [part for s in range(int(starts.sum())) for part in (sentinel[s : s + 1], row[noise & (span == s)])]
        last = sentinel[int(starts.sum())][None] if self.kind == "t5" else torch.tensor([self.end])
        labels = torch.cat([*pieces, last])
        decoder = torch.cat([torch.tensor([self.start]), labels[:-1]])
        return Sample(
            ids=encoder,
            keep=~torch.isin(encoder, sentinel),
            decoder_ids=decoder,
            decoder_keep=~torch.isin(labels, torch.cat([sentinel, last])),
            labels=labels,
        )


def _fixed_spans(length: int, most_spans: int, generator: torch.Generator) -> Tensor:
    """bool `[length]`: spans of exactly 3 tokens, each after at least one that stays."""
    width = min(int(MEAN_SPAN), length - 1)
    spans = min(max(int(length * NOISE_DENSITY) // width, 1), most_spans, length // (width + 1))
    before = torch.randperm(length - width * spans, generator=generator)[:spans].sort().values
    noise = torch.zeros(length, dtype=torch.bool)
    first = before + 1 + width * torch.arange(spans)
    noise[(first[:, None] + torch.arange(width)).flatten()] = True
    return noise


def _random_spans(length: int, most_spans: int, generator: torch.Generator) -> Tensor:
    """bool `[length]`: T5's random_spans_noise_mask, which starts with text and ends with noise."""
    noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    spans = min(max(round(noise / MEAN_SPAN), 1), noise, length - noise, most_spans)

    def lengths(total: int) -> Tensor:
        cuts = torch.randperm(total - 1, generator=generator)[: spans - 1].sort().values + 1
        edges = torch.cat([torch.tensor([0]), cuts, torch.tensor([total])])
        return edges.diff()

    runs = torch.stack([lengths(length - noise), lengths(noise)], dim=1).flatten()
    return torch.repeat_interleave(torch.tensor([False, True]).repeat(spans), runs)


def with_noise(samples: list[Sample], share: float, vocabulary: int, seed: int) -> list[Sample]:
    """Every second sample with a share of what the (first) stack reads replaced by random tokens below `vocabulary`."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(sample: Sample) -> Sample:
        chosen = torch.rand(len(sample.ids), generator=generator) < share
        random = torch.randint(0, vocabulary, sample.ids.shape, generator=generator)
        return replace(sample, ids=torch.where(chosen, random, sample.ids))

    return [noisy(s) if number % 2 else s for number, s in enumerate(samples)]


# --- a model's samples


def load_tokenizer(source: str, revision: str | None = None) -> Any:
    """The tokenizer of a model folder or hub id. Raises CalibrationError when it cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise CalibrationError(f"{source}: the tokenizer could not be loaded: {e}") from e


def longest(config: Any) -> int:
    """Tokens per sample where nobody says: the model's maximum, at most 2048; 512 where it has none."""
    return min(getattr(config.get_text_config(), "max_position_embeddings", None) or 512, 2048)


def samples_of(rows: Tensor, tokenizer: Any, config: Any, *, seed: int, corruption: str, origin: str) -> list[Sample]:
    """Samples of the kind that the model of `config` takes, from windows `[samples, length]` of `origin`."""
    vocabulary = config.get_text_config().vocab_size
    if corruption not in CORRUPTIONS:
        raise UnknownName("span corruption", corruption, list(CORRUPTIONS))
    if int(rows.max()) >= vocabulary:
        raise CalibrationError(
            f"{origin}: the tokenizer gave id {int(rows.max())}, the model has {vocabulary} embeddings; tokenizer and "
            "model do not belong together"
        )
    if config.is_encoder_decoder:
        return SpanCorruption.of(tokenizer, config, corruption).samples(rows, seed)
    return causal_samples(rows, tokenizer.all_special_ids)
