"""What a run holds in memory at its fullest, phase by phase, by the order of work of `compress` and `probe`.

Nothing is measured here but the process itself. The names of the terms are those of the code; bytes are float32's where
nothing else is said, since a CPU computes in it.
"""

from dataclasses import dataclass, replace
from math import prod

from halfbit.blueprint import Blueprint
from halfbit.expert_groups import EXPERT_TOKENS, POOLED_TOKENS
from halfbit.experts import ExpertStack
from halfbit.flow import BLOCK_TOKENS
from halfbit.grids.bilevel import Bilevel
from halfbit.model_gate import MOST_LOGITS
from halfbit.parts import Matrices
from halfbit.probe import TRIAL_BYTES, TRIAL_TOKENS
from halfbit.recipe import Recipe, Rule
from halfbit.solve.hessian import WORKSPACE_ELEMENTS
from halfbit.teacher import EXPERTS

F32, F64 = 4, 8
# float64 matrices' worth of memory while one is damped and factored
FACTORING = 2
# weights of other groups while one is solved, in weights of a group
PIPELINE = 3
# of what a group takes at its fullest, what the C library keeps in pieces between large tensors after some blocks
# (measured: 107 and 180 MiB of 400)
PIECES = 0.4
# copies of the Hessians while they move towards the pooled one
SHRINKING = 3
# what libraries add to the process that plans, until it solves; and tokenizer, text and what products leave behind
WARM, SHOWN = 20 << 20, 100 << 20
# tokens of the two sides of a sample with spans corrupted, for each token of text
ENCODER, DECODER = 0.9, 0.2
# what --offload keeps in files
ACTIVATIONS = ("activations of the samples", "what experts are given and answer")
# copies of the logits of held-back text
LOGITS = 5
# of a matrix in the manifest, as Python objects and as text while it is written
MANIFEST = 2500


@dataclass(frozen=True)
class Peak:
    """The fullest moment of a phase.

    Attributes:
        phase: "measuring options", "solving" or "gates".
        block: where it is.
        host, device: bytes by what takes them; nothing on the device where that is the CPU.
    """

    phase: str
    block: str
    host: dict[str, int]
    device: dict[str, int]

    def bytes_of(self, what: tuple[str, ...]) -> int:
        """On the host."""
        return sum(self.host.get(name, 0) for name in what)

    def without(self, what: tuple[str, ...]) -> "Peak":
        """The same without some of what lies on the host."""
        return replace(self, host={name: n for name, n in self.host.items() if name not in what})

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())


@dataclass(frozen=True)
class Load:
    """What runs through one chain of blocks.

    Attributes:
        tokens: of all samples; `length`: of one.
        heard: tokens of the encoder's states that a decoder listens to.
    """

    blocks: tuple[str, ...]
    tokens: int
    length: int
    heard: int = 0


def loads(blueprint: Blueprint, samples: int, length: int) -> list[Load]:
    """The chains of blocks, in order."""
    stacks = blueprint.family.stacks()
    if len(stacks) == 1:
        return [Load(tuple(stacks[0].blocks), samples * length, length)]
    first, second = (max(1, int(share * length)) for share in (ENCODER, DECODER))
    return [
        Load(tuple(stacks[0].blocks), samples * first, first),
        Load(tuple(stacks[1].blocks), samples * second, second, samples * first),
    ]


def width(blueprint: Blueprint) -> int:
    """Of the activations."""
    return blueprint.family.model.get_input_embeddings().weight.shape[1]


def vocabulary(blueprint: Blueprint) -> int:
    return blueprint.family.model.get_input_embeddings().weight.shape[0]


def heads(blueprint: Blueprint) -> int:
    text = blueprint.config.get_text_config()
    return getattr(text, "num_attention_heads", None) or getattr(text, "num_heads", 1)


def forward_bytes(blueprint: Blueprint, block: str, load: Load) -> int:
    """Of one batch inside of a block without its experts: inputs and outputs of its linear layers, attention."""
    tokens = max(BLOCK_TOKENS, load.length) if load.tokens > BLOCK_TOKENS else load.tokens
    sides = sum(sum(shape) for _, shape, _ in blueprint.inside(block) if len(shape) == 2)
    d = width(blueprint)
    # attention without a fused kernel holds its scores: as they are, with their bias, as probabilities
    scores = 3 * heads(blueprint) * load.length if load.heard or len(blueprint.family.stacks()) > 1 else 0
    return F32 * tokens * (4 * d + min(sides, 24 * d) // 2 + scores)


def block_bytes(blueprint: Blueprint, block: str) -> int:
    """A block's weights without its experts."""
    return F32 * sum(prod(shape) for _, shape, _ in blueprint.inside(block))


def outer_bytes(blueprint: Blueprint) -> int:
    """Of the weights outside the blocks."""
    return F32 * sum(prod(shape) for _, shape, _ in blueprint.outside())


def routed_bytes(blueprint: Blueprint, tokens: int) -> int:
    """What an experts module is given and what it answers, and the routing."""
    return tokens * (2 * F32 * width(blueprint) + 32 * blueprint.per_token)


def factor_bytes(experts: int, n: int) -> int:
    """Workspace of factoring Hessians of width `n`, some at a time."""
    at_once = min(experts, max(1, WORKSPACE_ELEMENTS // (n * n)))
    return FACTORING * F64 * at_once * n * n


def solve_bytes(experts: int, out: int, n: int, rules: list[Rule], *, asymmetric: bool) -> int:
    """Hessians and solver of so many matrices `[out, n]`, the weights themselves left out."""
    h = F32 * experts * n * n
    if all(rule.solver == "rtn" for rule in rules):
        # the loss is that under a unit matrix
        return h + 3 * F32 * out * n
    kept = h * (2 if asymmetric else 1)
    rotated = any(getattr(r.codec, "rotated", False) for r in rules)
    ordered = any(r.order != "identity" for r in rules)
    weights = experts * out * n
    # what is fed back, codes, which are outliers and what of; and one matrix at a time decoded and compared
    outliers = (F32 + 1) * any(isinstance(r.grid, Bilevel) for r in rules)
    sweep = weights * (F32 + 1 + outliers + (F32 if ordered or rotated else 0)) + 4 * F32 * out * n
    solving = kept + (h if rotated else 0) + (2 * h if ordered else 0) + h + max(factor_bytes(experts, n), sweep)
    return max(solving, (kept - h) + SHRINKING * h)


def experts_bytes(
    stack: ExpertStack, batch: int, rules: tuple[list[Rule], list[Rule]], tokens: int, *, asymmetric: bool
) -> int:
    """The fullest moment of a group of experts, from reading to what it decodes to."""
    experts = min(batch, stack.num_experts)
    out, d = sum(stack.projections[p][0] for p in stack.up), stack.projections[stack.up[0]][1]
    written, inner = stack.projections[stack.down]
    up, down = F32 * experts * out * d, F32 * experts * written * inner
    some = min(EXPERT_TOKENS, max(tokens, POOLED_TOKENS))
    seen = F32 * some * (d + 2 * out + inner)
    first = solve_bytes(experts, out, d, rules[0], asymmetric=asymmetric) + (up if asymmetric else 0)
    second = solve_bytes(experts, written, inner, rules[1], asymmetric=asymmetric)
    second += up // F32 + (2 * up + down if asymmetric else 0)
    codes = (up + down) // F32
    decoded = codes + up + down + max(up, down) + (up + down if asymmetric else 0)
    # one group is solved while the one before is decoded and run, and the one behind read
    return (1 + PIPELINE) * (up + down) + max(first, second) + max(decoded, seen)


def _options(rule: Rule) -> list[Rule]:
    return list(rule.options) or [rule]


def solving(blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], samples: int, base: int, device: str) -> Peak:
    """The fullest block of the run itself."""
    followed = recipe.solving.asymmetric
    data = needs_data(packed)
    held = recipe.gates.held_back * recipe.calibration.sequence_length
    d, best = width(blueprint), None
    matrices = sum(m.count for m in packed)
    for load in loads(blueprint, samples + recipe.gates.held_back, recipe.calibration.sequence_length):
        for block in load.blocks:
            here = [m for m in packed if m.block == block]
            compressed = sum(m.nbytes for m in here)
            host = {"python, torch, transformers": base, "compressed block": compressed}
            host["manifest"] = MANIFEST * matrices
            work: dict[str, int] = {}
            modules = 2 if followed else 1
            if data:
                host["tokenizer, text"] = SHOWN
                # before and after the original block, and what its experts are given and answer
                host["held-back samples, for gates"] = held * 3 * F32 * d + routed_bytes(blueprint, held)
                host[ACTIVATIONS[0]] = F32 * d * (load.tokens + load.heard) * modules
                work["embeddings and head"] = outer_bytes(blueprint)
                work["block without experts"] = block_bytes(blueprint, block)
            forward = forward_bytes(blueprint, block, load) if data else 0
            group = linear = routed = 0
            for stack in (s for p, s in blueprint.stacks.items() if p.startswith(f"{block}.")):
                pair = [m for m in here if m.path == stack.path]
                routed = max(routed, routed_bytes(blueprint, load.tokens) if data else 0)
                if followed and pair:
                    routed += F32 * d * load.tokens
                tokens = load.tokens * blueprint.per_token // stack.num_experts
                rules = tuple(_options(m.rule) for m in pair) or ([], [])
                assert len(rules) == 2
                batch = recipe.solving.experts_per_batch
                group = max(group, experts_bytes(stack, batch, rules, tokens, asymmetric=followed))
            for m in here:
                if m.kind != "experts":
                    need = 2 * F32 * prod(m.shape)
                    need += solve_bytes(1, *m.shape, _options(m.rule), asymmetric=False)
                    linear = max(linear, need)
            if routed:
                host[ACTIVATIONS[1]] = routed
            host["freed, in pieces"] = int(PIECES * group)
            # the experts of a module, side by side and as one tall matrix, when nothing else is left of them
            fullest = max(group, linear + _hessians_of_linears(here), forward, compressed)
            name = "one batch in the block"
            if fullest != forward:
                name = "linear layers, Hessians, solver"
            if fullest == group:
                name = "group of experts, Hessians, solver"
            elif fullest == compressed:
                name = "compressed block, once more"
            work[name] = fullest
            found = _split("solving", block, host, work, device)
            if best is None or found.host_bytes + found.device_bytes > best.host_bytes + best.device_bytes:
                best = found
    assert best is not None
    return best


def judging(blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], base: int, device: str) -> Peak | None:
    """The finished folder beside one group of experts of the original; None where no gate looks at it."""
    gates, c = recipe.gates, recipe.calibration
    if not (gates.model and gates.held_back and needs_data(packed)):
        return None
    # what is compressed lies in the file, as far as the system has no room for it
    kept = F32 * (blueprint.parameters() - sum(m.weights for m in packed))
    folder = kept if device == "cpu" else kept + sum(m.nbytes for m in packed)
    tokens = heard_tokens(blueprint, gates.held_back, c.sequence_length)
    best = 0
    for load in loads(blueprint, 1, min(tokens, c.sequence_length)):
        for block in load.blocks:
            stacks = [s for p, s in blueprint.stacks.items() if p.startswith(f"{block}.")]
            groups = [min(EXPERTS, s.num_experts) * sum(map(prod, s.projections.values())) for s in stacks]
            need = block_bytes(blueprint, block) + 2 * F32 * max(groups, default=0)
            best = max(best, need + forward_bytes(blueprint, block, load))
    host = {"python, torch, transformers": base, "tokenizer, text": SHOWN}
    work = {
        "compressed model": folder,
        "embeddings and head": outer_bytes(blueprint),
        "block of the original": best,
        "logits": LOGITS * F32 * tokens * vocabulary(blueprint),
    }
    return _split("gates", "", host, work, device)


def heard_tokens(blueprint: Blueprint, samples: int, length: int) -> int:
    """Of held-back text that the finished model is judged on."""
    return min(max(MOST_LOGITS // vocabulary(blueprint), 2), samples * length)


def needs_data(packed: list[Matrices]) -> bool:
    """Whether anything is solved on calibration text."""
    return any(r.solver != "rtn" for m in packed for r in _options(m.rule))


def inputs_of_linears(here: list[Matrices]) -> list[int]:
    """Widths of the inputs of a block's linear layers: those in one module read one, but for the last, which reads what
    the others make (query, key and value; output)."""
    found: dict[tuple[str, int, bool], int] = {}
    linears = [m for m in here if m.kind == "linear layers"]
    last = {m.path.rpartition(".")[0]: m.path for m in linears}
    for m in linears:
        parent = m.path.rpartition(".")[0]
        found[parent, m.shape[1], m.path == last[parent]] = m.shape[1]
    return list(found.values())


def _hessians_of_linears(here: list[Matrices]) -> int:
    """Those of all layers before, or behind, the experts are there together; layers of one input share one."""
    return sum(F32 * n * n for n in inputs_of_linears(here))


def measuring(
    blueprint: Blueprint, recipe: Recipe, packed: list[Matrices], samples: int, base: int, device: str
) -> Peak | None:
    """The fullest block of the pass that measures what options cost; None where there are none."""
    roles = [m for m in packed if m.rule.options]
    if not roles:
        return None
    d, best = width(blueprint), None
    done = 0
    for load in loads(blueprint, samples, recipe.calibration.sequence_length):
        few = trial_tokens(blueprint, roles, load)
        for block in load.blocks:
            here = [m for m in roles if m.block == block]
            done += len(here)
            host = {"python, torch, transformers": base, "tokenizer, text": SHOWN}
            host[ACTIVATIONS[0]] = F32 * d * (load.tokens + load.heard)
            host["activations of the trials"] = F32 * d * few * (done + 1)
            work = {
                "embeddings and head": outer_bytes(blueprint),
                "block without experts": block_bytes(blueprint, block),
                "layers as the trials have them": F32 * sum(prod(m.shape) for m in here if m.kind != "experts"),
            }
            fullest = forward_bytes(blueprint, block, load)
            for stack in (s for p, s in blueprint.stacks.items() if p.startswith(f"{block}.")):
                host[ACTIVATIONS[1]] = routed_bytes(blueprint, load.tokens)
                host["the same of the trials"] = (done + 1) * routed_bytes(blueprint, few)
                experts = min(recipe.solving.experts_per_batch, stack.num_experts)
                out, inner = sum(stack.projections[p][0] for p in stack.up), stack.projections[stack.down][1]
                weights = F32 * experts * sum(map(prod, stack.projections.values()))
                role = F32 * experts * max(out * d, d * inner)
                options = [o for m in here if m.path == stack.path for o in _options(m.rule)]
                solver = max(
                    solve_bytes(experts, out, d, options, asymmetric=False),
                    solve_bytes(experts, d, inner, options, asymmetric=False),
                )
                # as it was, as the trials have it; one role as it is tried, decoded and before
                fullest = max(fullest, 2 * weights + max(solver, 2 * role) + role)
            for m in here:
                if m.kind != "experts":
                    need = 3 * F32 * prod(m.shape) + solve_bytes(1, *m.shape, _options(m.rule), asymmetric=False)
                    fullest = max(fullest, need + _hessians_of_linears(here))
            work["weights, Hessians, solver"] = fullest
            if block == load.blocks[-1]:
                logits = 6 * F32 * min(few, BLOCK_TOKENS) * vocabulary(blueprint)
                work["weights, Hessians, solver"] = max(fullest, logits)
            found = _split("measuring options", block, host, work, device)
            if best is None or found.host_bytes + found.device_bytes > best.host_bytes + best.device_bytes:
                best = found
    return best


def trial_tokens(blueprint: Blueprint, roles: list[Matrices], load: Load) -> int:
    """Tokens of one trial, as `probe` chooses them."""
    tokens = min(TRIAL_TOKENS, TRIAL_BYTES // (F32 * width(blueprint) * max(len(roles), 1)))
    return min(load.tokens, max(1, tokens // load.length) * load.length)


def _split(phase: str, block: str, host: dict[str, int], work: dict[str, int], device: str) -> Peak:
    if device == "cpu":
        return Peak(phase, block, {k: v for k, v in (host | work).items() if v}, {})
    return Peak(phase, block, {k: v for k, v in host.items() if v}, {k: v for k, v in work.items() if v})
