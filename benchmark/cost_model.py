"""What a denoising step costs on many devices: pure functions of a model's sizes, a layout and a machine's parameters.

Nothing in here is measured. `benchmark/scaling.py` holds the model against what it measures on its own machine.

What is counted, for one image:

- Blocks: matrix products and attention (`xfuser.model_executor.cache.blocks.flops` counts the same ones), shared evenly
  by the sequence group, plus a fixed time a block that does not shrink with its tokens (launching its kernels).
- Embedding and tail: on all tokens, on every rank; sharing the tokens does not make them shorter.
- Ulysses: 4 all-to-alls a block (query, key, value, output), of which (u - 1)/u of a rank's tensor leaves the rank.
- Ring: r - 1 passes of keys and values a block, behind the attention on the part before where ``overlaps``.
- Sequence parallelism also gathers the last block's output once a step, in skipped steps too.
- PipeFusion: N stages take M parts of the work in turn, in (M + N - 1)/M of a stage's time; N - 1 hand-overs
  to fill the pipe, further ones behind the next part's computing where ``overlaps``. At the end one broadcast.
- CFG: each branch on ranks of its own; one exchange of the predicted noise.
- The decision: one gloo all-gather over all ranks of the image, which is a ring of (ranks - 1) rounds, plus the host's
  time to decide. Each all-gather carries `exchange_bytes` from every rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

from xfuser.model_executor.cache.adacorrection.offset import DRIFT, ROW

FLOAT32 = 4


@dataclass(frozen=True)
class Link:
    """Seconds before the first byte of a message, and bytes a second after it."""

    latency: float
    bandwidth: float

    def seconds(self, sent: float, messages: int = 1) -> float:
        """What a rank spends that sends so many bytes in so many messages one after the other."""
        return messages * self.latency + sent / self.bandwidth


@dataclass(frozen=True)
class Machine:
    """Parameters of a cluster.

    Attributes:
        flops: Achievable FLOP/s of a device.
        inside: Between devices of a node.
        across: Between nodes, a device.
        control: Of one round of the control channel (gloo over TCP) inside a node.
        control_across: The same between nodes.
        node: Devices a node.
        block_seconds: What a block costs besides its FLOPs.
        step_seconds: What a step costs besides its blocks, its embedding and its tail.
        decision_seconds: The host's time to decide, with the wait for the device; it is spent with a cache only.
        element_bytes: Of an activation.
        overlaps: Whether ring and pipe transfers go on behind computing.
    """

    flops: float
    inside: Link
    across: Link
    control: Link
    control_across: Link
    node: int = 8
    block_seconds: float = 0.0
    step_seconds: float = 0.0
    decision_seconds: float = 0.0
    element_bytes: int = 2
    overlaps: bool = True

    def link(self, ranks: int) -> Link:
        """What a group of that many neighbouring ranks talks over; the slowest link decides."""
        return self.inside if ranks <= self.node else self.across

    def control_link(self, ranks: int) -> Link:
        return self.control if ranks <= self.node else self.control_across


@dataclass(frozen=True)
class Blocks:
    """Blocks of one kind.

    Attributes:
        count: How many.
        flops: Of one block on all tokens of one image and one branch.
    """

    count: int
    flops: float


@dataclass(frozen=True)
class Workload:
    """One image (or video) of one model.

    Attributes:
        name: For tables.
        blocks: All of them, in order.
        width: Channels of a token.
        heads: Attention heads.
        tokens: Tokens that attend to each other: image and, where it is joint, text.
        outside_flops: Embedding and tail, of one branch.
        output_numbers: Numbers in the predicted noise of one branch.
        branches: 2 with classifier-free guidance.
        images: At once.
        batched: Whether one call of the transformer has both branches.
    """

    name: str
    blocks: tuple[Blocks, ...]
    width: int
    heads: int
    tokens: int
    outside_flops: float
    output_numbers: float
    branches: int = 1
    images: int = 1
    batched: bool = False

    @property
    def depth(self) -> int:
        return sum(each.count for each in self.blocks)

    @property
    def block_flops(self) -> float:
        """All blocks, one image, one branch."""
        return sum(each.count * each.flops for each in self.blocks)


@dataclass(frozen=True)
class Layout:
    """Degrees of one image's ranks.

    ``parts`` is what PipeFusion splits a step into. The default takes a part a stage, as displaced steps do; with a
    cache the engine's steps are synchronous by default, and then a part is a group of images: one image is one part.
    """

    ulysses: int = 1
    ring: int = 1
    pipefusion: int = 1
    cfg: int = 1
    parts: int | None = None

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring * self.pipefusion * self.cfg

    @property
    def sequence(self) -> int:
        return self.ulysses * self.ring

    @property
    def name(self) -> str:
        degrees = (("cfg", self.cfg), ("pipefusion", self.pipefusion), ("ring", self.ring), ("ulysses", self.ulysses))
        return " × ".join(f"{name} {degree}" for name, degree in degrees if degree > 1) or "one device"


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step on the slowest rank, by what they are spent on."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def statistics_share(self) -> float:
        """Share of the all-gather of sums."""
        return self.parts.get("statistics", 0.0) / self.seconds


# -- FLOPs ------------------------------------------------------------------------------------------------------------


def attention_flops(queries: int, keys: int, width: int) -> float:
    """Scores and their product with the values, over all heads."""
    return 4.0 * queries * keys * width


def flux_blocks(dual: int, single: int, width: int, image: int, text: int) -> tuple[Blocks, Blocks]:
    """FLUX's dual and single blocks, with their modulation."""
    tokens = image + text
    attention = attention_flops(tokens, tokens, width)
    products = 24.0 * tokens * width**2
    return Blocks(dual, products + attention + 24.0 * width**2), Blocks(single, products + attention + 6.0 * width**2)


def flux_outside_flops(width: int, image: int, text: int, channels: int, text_channels: int, pooled: int) -> float:
    """FLUX's embeddings (256 frequencies of time and of guidance) and its tail."""
    tokens = 2.0 * image * channels * width * 2 + 2.0 * text * text_channels * width
    vectors = 2.0 * width * (2 * (256 + width) + pooled + width) + 4.0 * width**2
    return tokens + vectors


def wan_blocks(count: int, width: int, hidden: int, video: int, text: int) -> tuple[Blocks]:
    """Wan's blocks: self attention over the video, cross attention to the text, a feed-forward of ``hidden``."""
    own = 8.0 * video * width**2 + attention_flops(video, video, width)
    cross = 4.0 * video * width**2 + 4.0 * text * width**2 + attention_flops(video, text, width)
    return (Blocks(count, own + cross + 4.0 * video * width * hidden),)


def wan_outside_flops(width: int, video: int, text: int, channels: int, text_channels: int) -> float:
    """Wan's embeddings and tail; ``channels`` are those of a token (latent channels × patch)."""
    tokens = 2.0 * video * channels * width * 2 + 2.0 * text * width * (text_channels + width)
    return tokens + 2.0 * width * (256 + width + 6 * width)


def dit_blocks(count: int, width: int, tokens: int) -> tuple[Blocks]:
    """DiT's blocks; each embeds time (256 frequencies) and modulates by itself."""
    products = 24.0 * tokens * width**2 + attention_flops(tokens, tokens, width)
    return (Blocks(count, products + 2.0 * width * (256 + width) + 12.0 * width**2),)


def exchange_bytes(blocks: int, signals: int, measures: bool = True) -> int:
    """What a rank sends in a step's exchange, in float32: the signal, the drift, a flag, and a row a block and one."""
    return FLOAT32 * (signals + DRIFT + 1 + (ROW * (blocks + 1) if measures else 0))


FLUX = Workload(
    "FLUX.1-dev, 1024 × 1024",
    flux_blocks(19, 38, 3072, 4096, 512),
    width=3072,
    heads=24,
    tokens=4096 + 512,
    outside_flops=flux_outside_flops(3072, 4096, 512, 64, 4096, 768),
    output_numbers=4096 * 64,
)
WAN = Workload(
    "Wan2.1-14B, 720p × 81 frames",
    wan_blocks(40, 5120, 13824, 75600, 512),
    width=5120,
    heads=40,
    tokens=75600,  # 21 latent frames of 45 × 80 tokens
    outside_flops=wan_outside_flops(5120, 75600, 512, 64, 4096),
    output_numbers=75600 * 64,
    branches=2,
)


# -- time -------------------------------------------------------------------------------------------------------------


def step_cost(
    work: Workload, layout: Layout, machine: Machine, evaluated: float = 1.0, exchanged: int | None = None
) -> StepCost:
    """One step's cost.

    Args:
        work: What is generated.
        layout: On how many devices.
        machine: Which ones.
        evaluated: The share of its blocks that run: 1 for an evaluated step, 0 for a skipped one; between them for a
            probed block.
        exchanged: Bytes that each rank sends in the decision's exchange; ``None`` decides nothing, without a cache.
    """
    branches = ceil(work.branches / layout.cfg)
    images, calls = branches * work.images, 1 if work.batched else branches
    numbers = work.tokens * work.width * images / layout.sequence
    parts = {
        "compute": evaluated * _blocks(work, layout, machine, images, calls),
        "outside": images * work.outside_flops / machine.flops + machine.step_seconds,
    }
    if layout.sequence > 1:
        blocks = evaluated * work.depth / layout.pipefusion
        each = _attention_exchange(work, layout, machine, images, calls * parts_of(layout))
        gathered = numbers * machine.element_bytes * (layout.sequence - 1)
        parts["attention exchange"] = blocks * bubble(layout) * each
        parts["attention exchange"] += machine.link(layout.sequence).seconds(gathered, calls)
    if layout.pipefusion > 1:
        parts["pipeline"] = _pipeline(work, layout, machine, images, calls, evaluated)
    if layout.cfg > 1:
        sent = work.output_numbers * images * machine.element_bytes
        parts["guidance"] = machine.link(layout.ranks).seconds(sent)
    if exchanged is not None:
        parts["decision"] = calls * machine.decision_seconds
        parts["statistics"] = calls * exchange_seconds(layout.ranks, exchanged, machine)
    return StepCost(parts)


def exchange_seconds(ranks: int, sent: int, machine: Machine) -> float:
    """A gloo all-gather: a ring of ranks - 1 rounds, each with one rank's bytes."""
    return machine.control_link(ranks).seconds(sent * (ranks - 1), ranks - 1)


def mean_seconds(work: Workload, layout: Layout, machine: Machine, share: float, exchanged: int) -> float:
    """A cached step on average, where that share of the steps is evaluated."""
    evaluated = step_cost(work, layout, machine, 1.0, exchanged).seconds
    skipped = step_cost(work, layout, machine, 0.0, exchanged).seconds
    return share * evaluated + (1 - share) * skipped


def parts_of(layout: Layout) -> int:
    return layout.pipefusion if layout.parts is None else layout.parts


def bubble(layout: Layout) -> float:
    """What filling and draining the pipe costs: (M + N - 1)/M."""
    parts = parts_of(layout)
    return (parts + layout.pipefusion - 1) / parts


def _blocks(work: Workload, layout: Layout, machine: Machine, images: int, calls: int) -> float:
    products = images * work.block_flops / layout.sequence / layout.pipefusion / machine.flops
    # A stage launches its blocks anew for every part.
    launches = work.depth / layout.pipefusion * machine.block_seconds * parts_of(layout)
    return (products + calls * launches) * bubble(layout)


def _attention_exchange(work: Workload, layout: Layout, machine: Machine, images: int, calls: int) -> float:
    """Of one block that is called so many times, which share its tokens and images."""
    u, r = layout.ulysses, layout.ring
    sent = work.tokens * work.width * images / layout.sequence * machine.element_bytes
    seconds = 0.0
    if u > 1:
        seconds += machine.link(u).seconds(4 * sent * (u - 1) / u, 4 * calls)
    if r > 1:
        # The ring's neighbours are u ranks apart, so a ring that leaves the node does so even where it is short.
        each = machine.link(u * r).seconds(2 * sent, calls)
        behind = images * attention_flops(work.tokens, work.tokens, work.width) / (r * r * u) / machine.flops
        seconds += (r - 1) * (max(0.0, each - behind) if machine.overlaps else each)
    return seconds


def _pipeline(work: Workload, layout: Layout, machine: Machine, images: int, calls: int, evaluated: float) -> float:
    stages, parts = layout.pipefusion, parts_of(layout)
    link = machine.link(layout.ranks)
    numbers = work.tokens * work.width * images / layout.sequence
    hop = link.seconds(numbers * machine.element_bytes / parts, calls)
    stage = _blocks(work, layout, machine, images, calls) / (parts + stages - 1)
    further = max(0.0, hop - stage) if machine.overlaps else hop
    told = link.seconds(work.output_numbers * images * machine.element_bytes, calls)
    return evaluated * ((stages - 1) * hop + (parts - 1) * further) + told
