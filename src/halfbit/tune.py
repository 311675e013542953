"""Tuning a compressed model towards the original: what stays continuous, and the codes, by KL divergence on a text.

    ask the original, block by block, what it says of the text; keep the answers on the disk
    load the compressed model; experts become tunable, all else that is not packed learns as it is
    Adam over the text's windows, all but a part that is held back
    round what was learned to what is stored; keep it only if the held-back part is the better for it

The original and the compressed model are never both in memory. A run that was killed goes on from the last state it
saved and gives the same result. The compressed folder it starts from stays as it is; the result is a new one.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from halfbit.disk import atomically
from halfbit.errors import RecipeError
from halfbit.evaluate import load
from halfbit.events import Event, Noticed, Tuned
from halfbit.expert_groups import Group
from halfbit.families import open_family
from halfbit.family import Family, read_config
from halfbit.layout import Entry, stored_name
from halfbit.learner import Learner
from halfbit.manifest import read_manifest
from halfbit.nn import PackedExperts, PackedLinear, stored_names
from halfbit.reader import Reader
from halfbit.recipe import ROUTERS, Tuning
from halfbit.samples import Sample, with_noise
from halfbit.teacher import ask, divergence
from halfbit.tunable import DENSITY_EVERY, TunableExperts, TunableMatrix, TunableStack, frozen, is_tunable
from halfbit.types import Packed, corrections
from halfbit.untrusted import read_json
from halfbit.writer import INDEX, Writer

TEACHER = ".teacher.safetensors"
STATE = ".tuning.safetensors"
# seconds of work that a kill may cost
SAVE_EVERY = 60.0
# nats from the original from which on steps are as large as the recipe says; nearer to it they shrink with the root, or
# they would do more harm than what is left to mend (docs/LOG.md)
FAR = 0.35


class Batches:
    """Which samples make a step: an order drawn anew for each pass over the text, by seed and pass alone."""

    def __init__(self, samples: list[Sample], tokens: int, seed: int):
        length = max(len(_predicting(s)) for s in samples)
        self._count, self._size, self._seed = len(samples), max(1, tokens // length), seed
        self._size = min(self._size, self._count)

    def __getitem__(self, step: int) -> list[int]:
        per_pass = self._count // self._size
        generator = torch.Generator().manual_seed(self._seed + step // per_pass)
        order = torch.randperm(self._count, generator=generator)
        first = step % per_pass * self._size
        return order[first : first + self._size].tolist()


class Teacher:
    """The original's answers, sample by sample."""

    def __init__(self, path: Path, samples: list[Sample]):
        found = load_file(path)
        self._tokens, self._logs = found["tokens"], found["logs"]
        self._starts = torch.tensor([0] + [len(_predicting(s)) for s in samples]).cumsum(0).tolist()

    def of(self, number: int) -> tuple[Tensor, Tensor]:
        rows = slice(self._starts[number], self._starts[number + 1])
        return self._tokens[rows], self._logs[rows]


def held_back(samples: int, tuning: Tuning) -> int:
    """How many samples, the last ones, are not learned from. Raises RecipeError where none would be left."""
    held = max(1, round(tuning.held_back * samples))
    if held >= samples:
        raise RecipeError(f"tuning: {samples} samples are too few to hold {held} of them back; give more text")
    return held


def tune(
    reader: Reader,
    compressed: Path,
    writer: Writer,
    samples: list[Sample],
    tuning: Tuning,
    *,
    device: str = "cpu",
) -> Iterator[Event]:
    """Tune `compressed`, a finished folder made of what `reader` reads, and write the result to the folder of `writer`.

    Yields:
        a `Tuned` for every step, and what should be known.
    """
    held = held_back(len(samples), tuning)
    learning, watched = range(len(samples) - held), range(len(samples) - held, len(samples))
    vocabulary = read_config(reader).get_text_config().vocab_size
    noisy = with_noise([samples[i] for i in learning], tuning.noise, vocabulary, tuning.seed)
    samples = [*noisy, *(samples[i] for i in watched)]
    teacher = _teacher(reader, writer, samples, device)
    student = Student(reader, compressed, tuning, device)
    yield from map(Noticed, student.notices)
    before = _measure(student.model, samples, watched, teacher, device)
    nearness = min(1.0, math.sqrt(max(before, 0.0) / FAR))
    yield from _learn(student, noisy, teacher, tuning, nearness, writer, device)
    stored = student.round()
    after = _measure(student.model, samples, watched, teacher, device)
    better = after < before
    kept = "kept" if better else "not kept: the tuned model is no better there"
    yield Noticed(f"tuning: divergence from the original on held-back text {before:.4f} -> {after:.4f} nats; {kept}")
    _write(compressed, writer, *(stored if better else ({}, {})))
    for name in (TEACHER, STATE):
        (writer.folder / name).unlink(missing_ok=True)


def _teacher(reader: Reader, writer: Writer, samples: list[Sample], device: str) -> Teacher:
    path = writer.folder / TEACHER
    if not path.is_file():
        tokens, logs = ask(open_family(reader), samples, device, _dtype(device))
        atomically(path, lambda temporary: save_file({"tokens": tokens, "logs": logs}, temporary))
    return Teacher(path, samples)


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _predicting(sample: Sample) -> Tensor:
    """The ids at whose places the model says what comes next."""
    return sample.ids if sample.decoder_ids is None else sample.decoder_ids


class Student:
    """The compressed model, tunable. Accumulates: its weights are what is learned.

    Attributes:
        model: of transformers.
        learned: what Adam moves, by name.
        notices: what is left as it is, and why.
    """

    def __init__(self, reader: Reader, compressed: Path, tuning: Tuning, device: str):
        self.notices: list[str] = []
        self.model = load(str(compressed), dtype=torch.float32, device=device)
        self.model.requires_grad_(False)
        self._device = device
        self.matrices: dict[tuple[str, str], TunableStack] = {}
        self._plain: dict[str, nn.Parameter] = {}
        family = open_family(reader)
        for path, module in list(self.model.named_modules()):
            if isinstance(module, PackedExperts):
                self._open(path, module, family, tuning, device)
            elif isinstance(module, PackedLinear):
                self.model.set_submodule(path, frozen(module))
        self._choose(compressed, tuning)
        parts = {f"{path}.{name}": m for (path, name), m in self.matrices.items()}
        self.learned: dict[str, nn.Parameter] = {
            f"{where}.{name}": p for where, m in parts.items() for name, p in m.named_parameters()
        } | self._plain
        for parameter in self.learned.values():
            parameter.requires_grad_(True)

    def _open(self, path: str, module: PackedExperts, family: Family, tuning: Tuning, device: str) -> None:
        names = stored_names(module.stack)
        found = [module.matrix(name) for name in names]
        original: list[Tensor | None] = [None, None]
        if tuning.codes and any(is_tunable(matrix.codec) for matrix in found):
            group = Group.read(family, family.experts[path], range(module.stack.num_experts), device)
            original = [group.up, group.down]
        stacks = [
            TunableStack(matrix.packed(), matrix.shape[0], weights).to(device)
            for matrix, weights in zip(found, original, strict=True)
        ]
        for name, stack in zip(names, stacks, strict=True):
            if stack.constant:
                count = f"{stack.constant} of {module.stack.num_experts}"
                self.notices.append(f"{path}.{name}: {count} experts are not ternary; they stay as they are")
            if stack.tunable:
                self.matrices[path, name] = stack
        self.model.set_submodule(path, TunableExperts(module, *stacks))

    @property
    def with_codes(self) -> dict[str, TunableMatrix]:
        """By name, the matrices whose codes may change."""
        members = {
            f"{path}.{name}.{n}": m for (path, name), s in self.matrices.items() for n, m in enumerate(s.tunable)
        }
        return {name: m for name, m in members.items() if m.latent is not None}

    def _choose(self, compressed: Path, tuning: Tuning) -> None:
        """Weights that are stored under their own name: norms, biases, routers; linear layers where `dense` says so."""
        stored = read_manifest(compressed)["tensors"]
        outside = {id(m.weight) for m in (self.model.get_input_embeddings(), self.model.get_output_embeddings()) if m}
        for name, parameter in self.model.named_parameters():
            if name not in stored or id(parameter) in outside or not parameter.is_floating_point():
                continue
            router = any(fnmatchcase(name.rpartition(".")[0], pattern) for pattern in ROUTERS)
            if parameter.ndim < 2 or router or tuning.dense:
                self._plain[name] = parameter
        self._dtypes = {name: stored[name]["dtype"] for name in self._plain}

    @torch.no_grad()
    def round(self) -> tuple[dict[tuple[str, str], list[Packed]], dict[str, Tensor]]:
        """Everything as it will be stored; the model computes with that from here on."""
        packed = {key: matrix.packed() for key, matrix in self.matrices.items()}
        for key, parts in packed.items():
            old = self.matrices[key]
            again = TunableStack(old.codec.stack(parts), len(parts)).to(self._device)
            tunable = self.model.get_submodule(key[0])
            assert isinstance(tunable, TunableExperts)
            if tunable.up is old:
                tunable.up = again
            else:
                tunable.down = again
        plain = {}
        for name, parameter in self._plain.items():
            plain[name] = parameter.detach().to(getattr(torch, self._dtypes[name]))
            parameter.data.copy_(plain[name])
        return packed, plain


def _learn(
    student: Student,
    samples: list[Sample],
    teacher: Teacher,
    tuning: Tuning,
    nearness: float,
    writer: Writer,
    device: str,
) -> Iterator[Event]:
    names, parameters = list(student.learned), list(student.learned.values())
    learner = Learner(parameters, tuning.learning_rate * nearness, tuning.steps)
    adam = learner.adam
    begin = _resume(writer.folder / STATE, names, student, adam)
    batches = Batches(samples, tuning.batch_tokens, tuning.seed)
    saved = time.monotonic()
    for step in range(begin, tuning.steps):
        learner.begin(step)
        loss = _loss(student.model, samples, batches[step], teacher, device)
        loss.backward()
        learner.end()
        if (step + 1) % DENSITY_EVERY == 0 or step + 1 == tuning.steps:
            for matrix in student.with_codes.values():
                matrix.keep_density()
        yield Tuned(step + 1, tuning.steps, loss.detach().item())
        if time.monotonic() - saved > SAVE_EVERY:
            _save(writer, names, student, adam, step + 1)
            saved = time.monotonic()
    _save(writer, names, student, adam, tuning.steps)


def _loss(model: Any, samples: list[Sample], chosen: list[int], teacher: Teacher, device: str) -> Tensor:
    """Mean divergence over the tokens of some samples."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i in chosen:
        decoder = samples[i].decoder_ids
        groups.setdefault((len(samples[i].ids), 0 if decoder is None else len(decoder)), []).append(i)
    total, count = torch.zeros((), device=device), 0
    for numbers in groups.values():
        inputs = {"input_ids": torch.stack([samples[i].ids for i in numbers]).to(device)}
        decoders = [d for i in numbers if (d := samples[i].decoder_ids) is not None]
        if decoders:
            inputs["decoder_input_ids"] = torch.stack(decoders).to(device)
        logits = model(**inputs, use_cache=False).logits
        logits = logits.reshape(-1, logits.shape[-1]).float()
        answers = [teacher.of(i) for i in numbers]
        tokens, logs = (torch.cat([a[k] for a in answers]).to(device) for k in (0, 1))
        total = total + divergence(logits, tokens, logs) * len(tokens)
        count += len(tokens)
    return total / count


@torch.no_grad()
def _measure(model: Any, samples: list[Sample], which: range, teacher: Teacher, device: str) -> float:
    losses = [float(_loss(model, samples, [i], teacher, device)) for i in which]
    return sum(losses) / len(losses)


# --- state, so that a run can be killed


def _save(writer: Writer, names: list[str], student: Student, adam: torch.optim.Adam, step: int) -> None:
    tensors = {}
    for name in names:
        parameter = student.learned[name]
        moments = adam.state[parameter]
        tensors |= {name: parameter.detach(), f"{name}#m": moments["exp_avg"], f"{name}#v": moments["exp_avg_sq"]}
    for name, matrix in student.with_codes.items():
        tensors[f"{name}#factor"] = matrix.factor
    whole = {k: t.detach().cpu().contiguous() for k, t in tensors.items()}
    atomically(writer.folder / STATE, lambda temporary: save_file(whole, temporary, metadata={"step": str(step)}))


def _resume(path: Path, names: list[str], student: Student, adam: torch.optim.Adam) -> int:
    """The step to go on with."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        for name in names:
            parameter = student.learned[name]
            parameter.data.copy_(file.get_tensor(name))
            adam.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"{name}#m").to(parameter.device),
                "exp_avg_sq": file.get_tensor(f"{name}#v").to(parameter.device),
            }
        for name, matrix in student.with_codes.items():
            matrix.factor.copy_(file.get_tensor(f"{name}#factor"))
    return step


# --- the result


def _write(
    compressed: Path, writer: Writer, packed: dict[tuple[str, str], list[Packed]], plain: dict[str, Tensor]
) -> None:
    """Every block of the compressed folder, with what was learned in the places of what was there."""
    manifest = read_manifest(compressed)
    begun = Writer(compressed, manifest["fingerprint"], manifest["about"])
    wholes = {}
    for (path, name), parts in packed.items():
        # of the codec that is there, so that the tensors keep their names
        codec = Entry.parse(begun.manifest["packed"][path][name], f"{path}.{name}").codec
        wholes[path, name] = replace(codec.stack(parts), correction=corrections(parts))
    replaced = dict(plain)
    for (path, name), whole in wholes.items():
        replaced |= {stored_name(path, name, part): t for part, t in whole.stored.items()}
    for block, entry in begun.manifest["blocks"].items():
        if writer.has(block):
            continue
        tensors = begun.read(block)
        for name, tensor in tensors.items():
            writer.put(name, replaced.get(name, tensor))
        for path, projections in begun.manifest["packed"].items():
            inside = any(name.startswith(f"{path}.") for name in tensors)
            if inside:
                entries = {
                    name: Entry.of(wholes[path, name], len(packed[path, name])).to_config()
                    if (path, name) in wholes
                    else config
                    for name, config in projections.items()
                }
                writer.record("packed", path, entries)
        writer.commit(block, entry["file"])
    for kind in ("matrices", "coverage", "outputs", "gates"):
        writer.manifest[kind].update(begun.manifest[kind])
    for (path, name), parts in packed.items():
        for number, part in enumerate(parts):
            writer.manifest["matrices"][f"{path}.{number}.{name}"]["bits_per_weight"] = part.bits_per_weight
    config = read_json(compressed / "config.json")
    config["quantization_config"]["modules"] = writer.manifest["packed"]
    copied = [compressed / name for name in manifest["files"] if name not in ("config.json", "recipe.toml", INDEX)]
    writer.finish(config, copied, (compressed / "recipe.toml").read_text("utf-8"))
