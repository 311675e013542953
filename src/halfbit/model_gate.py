"""What the finished folder says of held-back text, and what it writes by itself, against the original.

The folder is loaded as anyone would load it. The original may be larger than memory: it runs once, block by block, over
the held-back text and over what the compressed model wrote, and is asked about both. So it never writes itself; what it
would have written at each place, given what stands before, is what the compressed model's writing is compared with.

    perplexity  on the text, in units of the original's
    divergence  KL(original || compressed) on the text, in nats per token
    regret      of what was written: log p(the original's choice) - log p(what was written) by the original, mean
    entropy     of the next token at the places that were written, of both
    repetition  share of the tokens written that end a run of `RUN` tokens for the second time; and of the original's
                choices at the same places

With few bits a model comes near to one that only knows how frequent each token is in the calibration text, but not
beyond: so all but the last may be as that one's would be, which draws each token by itself; perplexity twice, the
divergence log 2 more, and regret a part of that (`OF_REGRET`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from halfbit.evaluate import answers, equal_shapes, load
from halfbit.families import open_family
from halfbit.gates import MODEL, Check
from halfbit.reader import Reader
from halfbit.recipe import Gates
from halfbit.samples import Sample
from halfbit.teacher import logits_of

# elements of the logits of held-back text, at most: half a GiB, and there are some five such tensors
MOST_LOGITS = 1 << 27
# of each sample's beginning, that the compressed model goes on from
PROMPT = 32
# with 0.3 bits it is half of what tokens drawn by their frequency have, of scrambled experts or embeddings 0.8 to 1.1
OF_REGRET = 0.7
# tokens whose repetition counts: of words, two or three
RUN = 4


@dataclass(frozen=True, eq=False)
class Written:
    """What the compressed model wrote after a prompt.

    Attributes:
        sample: prompt and writing, as the original reads them.
        first: row of the logits that the first written token is taken from.
        tokens: int64, what was written.
        entropy: float, of what could have come at each place.
    """

    sample: Sample
    first: int
    tokens: Tensor
    entropy: Tensor


@torch.no_grad()
def judge_model(
    reader: Reader, folder: Any, text: list[Sample], held: list[Sample], gates: Gates, device: str, dtype: torch.dtype
) -> list[Check]:
    """Checks of the finished folder; `held` are samples that nothing was solved on, `text` those that something was."""
    model = load(str(folder), device=device)
    if (choose := getattr(model, "set_experts_implementation", None)) is not None:
        choose("eager")  # experts that stayed as they were: the others want sizes that are multiples of 16 bytes
    vocabulary = model.config.get_text_config().vocab_size
    heard = few(held, MOST_LOGITS // vocabulary)
    groups = equal_shapes(heard, len(heard)) if gates.written else []
    wrote = [written for group in groups for written in write(model, group, gates.written, device)]
    theirs = Rows(logits_of(open_family(reader), [*heard, *(w.sample for w in wrote)], device, dtype))
    usual = frequencies(text, vocabulary).to(device)
    names = (
        "compressed",
        "original",
        "frequencies",
        "divergence",
        "divergence of frequencies",
        "regret of frequencies",
    )
    sums, count = dict.fromkeys(names, 0.0), 0
    for sample in heard:
        logits, labels = answers(model, [sample], device)
        p = theirs.take(sample)[: len(labels)].to(device, torch.float32).log_softmax(-1)
        q = logits.log_softmax(-1)
        sums["original"] += F.nll_loss(p, labels, reduction="sum").item()
        sums["compressed"] += F.nll_loss(q, labels, reduction="sum").item()
        sums["frequencies"] += F.nll_loss(usual.expand_as(p), labels, reduction="sum").item()
        sums["divergence"] += F.kl_div(q, p, log_target=True, reduction="sum").item()
        sums["divergence of frequencies"] += F.kl_div(usual.expand_as(p), p, log_target=True, reduction="sum").item()
        sums["regret of frequencies"] += (p.amax(-1) - p @ usual.exp()).sum().item()
        count += len(labels)
    mean = {name: total / count for name, total in sums.items()}
    factor, least = (_exp(mean[name] - mean["original"]) for name in ("compressed", "frequencies"))
    found = [
        Check.most("perplexity", MODEL, factor, max(gates.perplexity, 2 * least)),
        Check.most(
            "divergence",
            MODEL,
            mean["divergence"],
            max(gates.divergence, math.log(2) + mean["divergence of frequencies"]),
        ),
    ]
    if not wrote:
        return found
    figures = [_writing(w, theirs.take(w.sample).to(device, torch.float32)) for w in wrote]
    regret, ours, others, repeated, would = (float(torch.cat(part).mean()) for part in zip(*figures, strict=True))
    away = abs(float(-(usual.exp() * usual).sum()) - others)
    return [
        *found,
        Check.most("regret", MODEL, regret, max(gates.regret, OF_REGRET * mean["regret of frequencies"])),
        Check.most("entropy", MODEL, ours, max(gates.entropy, away), others),
        Check.most("repetition", MODEL, repeated, gates.repetition, would),
    ]


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0)) if math.isfinite(nats) else math.inf


def few(samples: list[Sample], tokens: int) -> list[Sample]:
    """So many samples as have so many tokens together, one at least; the text of a decoder is cut to that."""
    first = samples[0]
    if first.decoder_ids is None:
        length = max(2, min(tokens, len(first.ids)))
        samples = [replace(s, ids=s.ids[:length], keep=s.keep[:length]) for s in samples]
    return samples[: max(1, tokens // max(len(s.ids) for s in samples))]


def frequencies(samples: list[Sample], vocabulary: int) -> Tensor:
    """Natural logarithms of how frequent each token is in what is to be predicted, `[vocabulary]`; none is at 0."""
    counts = torch.ones(vocabulary, dtype=torch.float64)
    for sample in samples:
        said = sample.ids if sample.labels is None else sample.labels
        counts += torch.bincount(said.cpu(), minlength=vocabulary)
    return (counts / counts.sum()).log().float()


class Rows:
    """Logits that come for several samples at a time, handed out for one. Accumulates: what was not taken yet."""

    def __init__(self, logits: Iterator[Tensor]):
        self._logits, self._left = logits, torch.empty(0)

    def take(self, sample: Sample) -> Tensor:
        """The next rows, one for each token of the sample that predicts another."""
        count = len(sample.ids if sample.decoder_ids is None else sample.decoder_ids)
        while len(self._left) < count:
            more = next(self._logits)
            self._left = torch.cat([self._left.to(more), more]) if len(self._left) else more
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def write(model: Any, group: list[Sample], count: int, device: str) -> list[Written]:
    """Greedily, `count` tokens after the beginning of each sample, all of one shape; the decoder of an encoder-decoder
    model from its own."""
    length = max(1, min(PROMPT, len(group[0].ids) - 1))
    ids = torch.stack([s.ids for s in group]).to(device)
    spoken = [s.decoder_ids[:1] for s in group if s.decoder_ids is not None]
    prompts = torch.stack(spoken).to(device) if spoken else ids[:, :length]
    given = {"input_ids": ids, "decoder_input_ids": prompts} if spoken else {"input_ids": prompts}
    # not as the folder's own says: with no token that ends it, and nothing but the model's choice
    first = {"decoder_start_token_id": int(prompts[0, 0])} if spoken else {}
    model.generation_config = GenerationConfig(pad_token_id=0, **first)
    told = model.generate(
        **given,
        attention_mask=torch.ones_like(given["input_ids"]),
        max_new_tokens=count,
        do_sample=False,
        # transformers' cache of a Switch decoder has as many layers as the encoder
        use_cache=not spoken,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logs = torch.stack(told.logits, dim=1).float().log_softmax(-1)
    entropy = -(logs.exp() * logs).nansum(-1).cpu()
    found = []
    for sample, whole, e in zip(group, told.sequences.cpu(), entropy, strict=True):
        read = whole[:-1]
        none = torch.zeros(len(read), dtype=torch.bool)
        if spoken:
            heard = Sample(sample.ids, sample.keep, decoder_ids=read, decoder_keep=none, labels=whole[1:])
        else:
            heard = Sample(read, none)
        found.append(Written(heard, prompts.shape[1] - 1, whole[prompts.shape[1] :], e))
    return found


def _writing(wrote: Written, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of each token written: regret, entropy of both, whether it repeats, whether the original's choice would."""
    logs = logits[wrote.first :].cpu().log_softmax(-1)
    choice = logs.argmax(-1)
    regret = logs.gather(1, choice[:, None]) - logs.gather(1, wrote.tokens[:, None])
    entropy = -(logs.exp() * logs).nansum(-1)
    before = wrote.sample.ids if wrote.sample.decoder_ids is None else wrote.sample.decoder_ids
    ours = repeats(before, wrote.first + 1, wrote.tokens)
    theirs = repeats(before, wrote.first + 1, choice)
    return regret[:, 0], wrote.entropy, entropy, ours, theirs


def repeats(text: Tensor, first: int, tokens: Tensor) -> Tensor:
    """Float `[tokens]`: 1 where `tokens[i]`, in the place of `text[first + i]`, ends a run that was there before.

    `text` may end with the token before the last of `tokens`.
    """
    row = text.tolist()
    runs = [tuple(row[i : i + RUN]) for i in range(len(row) - RUN + 1)]
    found = []
    for i, token in enumerate(tokens.tolist()):
        place = first + i
        # runs that end before this place
        seen = set(runs[: max(0, place - RUN + 1)])
        found.append(float((*row[place - RUN + 1 : place], token) in seen and place >= RUN))
    return torch.tensor(found)
