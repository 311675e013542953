"""Linear layers outside the experts: which rule each has, their Hessians group by group, and what is written of them.

Layers that read one input (query, key and value; gate and up) share a Hessian, and the column order where it follows
from the Hessian alone: it is stored with the first of them. All before the experts of a block see the block as it was,
on the compressed blocks before it, as in the published code of SpQR (https://arxiv.org/abs/2306.03078); those behind
the experts see what is before them compressed. With `true_sequential` each group sees the groups before it compressed.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from halfbit.errors import RecipeError
from halfbit.events import Event, Noticed, Solved
from halfbit.experts import ExpertStack
from halfbit.family import Family
from halfbit.flow import Flow, Seen
from halfbit.layout import Entry
from halfbit.linears import WEIGHT, Linear, find_linears
from halfbit.outputs import Judged, unlike
from halfbit.recipe import Recipe, Rule
from halfbit.solving import solve
from halfbit.storing import keep_linear, kept_linear, put_linear
from halfbit.types import Packed
from halfbit.writer import Writer

Chosen = dict[str, tuple[Linear, Rule]]


def choose(recipe: Recipe, family: Family) -> Chosen:
    """The linear layers of the blocks, the embedding and the output head that a rule compresses, by path.

    Raises RecipeError for an embedding that is not rounded to nearest: it has no inputs to solve with, and must be
    there before anything else runs.
    """
    model = family.model
    head = model.get_output_embeddings()
    chosen: Chosen = {}
    for path, linear in find_linears(model, family.experts, family.claims().tied).items():
        # the first name that a rule matches, also one that keeps it as it was
        names = (path, *linear.twins)
        rule = next((recipe.rule(name) for name in names if recipe.first(name) is not None), None)
        in_block = family.block_of(path) is not None
        if rule is None or not (in_block or linear.kind == "embedding" or model.get_submodule(path) is head):
            continue
        if linear.kind == "embedding" and rule.solver != "rtn":
            raise RecipeError(
                f"{path}: an embedding is looked up, not multiplied, so there is nothing to solve with"
                f"{' (also where the output head is the same matrix)' if linear.twins else ''}; give it a rule with "
                'solver = "rtn" before the others'
            )
        sources = family.claims().sources
        source = sources[linear.name]
        weights, tensors = sum(other is source for other in sources.values()), sum(map(len, source.names.values()))
        if weights != 1 or tensors != 1:
            # what is packed takes the place of whole tensors
            raise RecipeError(
                f"{path}: {tensors} tensors of the checkpoint make {weights} weights of the model, of which this is "
                "one; not supported yet, leave it out with a rule that has no codec"
            )
        chosen[path] = linear, rule
    return chosen


def left_out(recipe: Recipe, family: Family, chosen: Chosen) -> Iterator[str]:
    """What a rule would compress if it could be: one sentence per kind of module."""
    packed = {path for linear, _ in chosen.values() for path in (linear.path, *linear.twins)} | set(family.experts)
    inside = tuple(f"{path}." for path in family.experts)
    tied = family.claims().tied
    kinds: dict[str, list[str]] = {}
    for path, module in family.model.named_modules():
        # a vector is no matrix: norms, biases
        matrices = [n for n, p in module.named_parameters(recurse=False) if p.dim() > 1 and f"{path}.{n}" not in tied]
        if matrices and path not in packed and not path.startswith(inside) and recipe.rule(path) is not None:
            kinds.setdefault(type(module).__name__, []).append(path)
    for kind, paths in kinds.items():
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"{paths[0]}{more}: matched by a rule, but {kind} cannot be compressed there; stored as it was"


def solve_reached(
    family: Family,
    pending: Chosen,
    flow: Flow | None,
    block: str,
    module: nn.Module | None,
    doors: Iterable[ExpertStack],
    recipe: Recipe,
    writer: Writer,
    device: str,
) -> Iterator[Event]:
    """Solve and write the layers in `pending` that run before the first of `doors`; they leave `pending`.

    Without a flow all of them. What stays, with no door left, never runs on the calibration text.
    """
    doors = list(doors)
    while pending:
        if flow is None or module is None:
            groups = [Seen([path], None) for path in pending]
        else:
            groups = flow.observe(block, module, pending, doors)
        for seen in groups[:1] if recipe.solving.true_sequential else groups:
            yield from solve_group(family, seen, pending, recipe, writer, device)
            for path in seen.paths:
                del pending[path]
        if not groups or (doors and not recipe.solving.true_sequential):
            return


def solve_group(
    family: Family, seen: Seen, rules: Mapping[str, tuple[Linear, Rule]], recipe: Recipe, writer: Writer, device: str
) -> Iterator[Event]:
    """Solve and write layers of one input; what is decoded takes the weights' place in the family's model."""
    orders: dict[str, Tensor] = {}
    by_hessian = False
    for path in seen.paths:
        linear, rule = rules[path]
        # the order that follows from the Hessian alone is the same again
        free = rule.order == "act_order" and by_hessian
        by_hessian |= rule.order == "act_order"
        w = family.weight(linear.name).to(device, torch.float32)
        found = kept_linear(writer.journal, path)
        if found is None:
            notices: list[str] = []
            h = None if seen.hessian is None else seen.hessian.sum.to(device)
            own = recipe.solving.beside_correction(rule, w.shape[1])
            (solution,) = solve(w[None], h, [own], recipe.solving, [path], notices, order_is_stored=not free)
            assert rule.codec is not None
            packed = rule.codec.encode(solution)
            decoded = rule.codec.decode(packed)
            facts = {"loss": solution.loss, "notices": notices, "wrong": unlike(solution, decoded)}
            if recipe.solving.added_bits(rule, w.shape[1]):
                packed = replace(packed, correction=_correction(w, decoded, seen, recipe))
            keep_linear(writer.journal, path, packed, facts)
        else:
            packed, facts = found
            decoded = packed.codec.decode(packed)
        yield from map(Noticed, facts["notices"])
        nbytes = put_linear(path, packed, orders, writer)
        fact = {
            "loss": facts["loss"],
            "bits_per_weight": 8 * nbytes / (packed.shape[0] * packed.shape[1]),
            "tokens": 0 if seen.hessian is None else int(seen.hessian.tokens[0]),
        }
        writer.record("matrices", linear.name, fact)
        yield Solved(linear.name, fact["loss"], fact["bits_per_weight"], fact["tokens"])
        judged = judge(w, decoded.to(w), seen.held, facts["wrong"], packed.correction)
        writer.record("outputs", path, judged.as_dict())
        _put(family, path, linear.name, packed, decoded)


def _correction(w: Tensor, decoded: Tensor, seen: Seen, recipe: Recipe) -> Tensor:
    """bfloat16 `[1, out]` on the CPU: what the layer's answers lack on the mean over its tokens; see
    `expert_groups.off`."""
    assert seen.hessian is not None
    assert seen.total is not None
    tokens = int(seen.hessian.tokens[0])
    mean = recipe.coverage.known(tokens) * seen.total.double() / max(tokens, 1)
    return ((w - decoded.to(w)).double() @ mean)[None].to("cpu", torch.bfloat16)


def _put(family: Family, path: str, name: str, packed: Packed, decoded: Tensor) -> None:
    """What is decoded takes the weight's place in the family's model."""
    family.replace(name, decoded)
    if packed.correction is not None:
        family.correct(path, packed.correction[0])


def judge(w: Tensor, decoded: Tensor, held: list[Tensor], wrong: int, correction: Tensor | None = None) -> Judged:
    """A layer's answers to held-back tokens, against the original's; its weights where nothing is held back."""
    if not held:
        return Judged.of(w, decoded, None, wrong)
    x = torch.cat(held).to(w)
    answers = x @ decoded.T
    return Judged.of(x @ w.T, answers if correction is None else answers + correction.to(w), len(x), wrong)


def put_back(family: Family, chosen: Iterable[str], writer: Writer, tensors: Mapping[str, Tensor]) -> None:
    """Committed layers of an interrupted run: what they decode to takes the weights' place in the family's model."""
    for path in chosen:
        if path not in writer.manifest["packed"]:
            continue  # it never ran
        entry = Entry.parse(writer.manifest["packed"][path][WEIGHT], f"{path}.{WEIGHT}")
        packed = entry.packed({part: tensors[name] for part, name in entry.stored(path, WEIGHT).items()})
        _put(family, path, f"{path}.{WEIGHT}", packed, packed.codec.decode(packed))
