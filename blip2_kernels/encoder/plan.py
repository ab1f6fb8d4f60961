"""Which exact saving applies to a pass, and what it saves.

Every saving is an identity: with it or without it the numbers are the same but for rounding. The plan decides
by shape, device and gradients alone, so it can be asked without running anything.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..checks import describe
from ..mask import MaskMode


class Saving(enum.StrEnum):
    """The ten savings, by the names under which they are forced on or off."""

    PROJECT_ONCE = "project_once"
    """An image's keys and values are computed once for every pass and sample that looks at it."""
    PACKED_TEXT = "packed_text"
    """No row is computed for padding. Off: padded rows, whose shapes do not depend on the texts."""
    ONE_PASS = "one_pass"
    """Contrastive text and caption ride along in the pass of the queries."""
    NO_IMAGE_GRADIENT = "no_image_gradient"
    """The image norm's weight and bias are folded into the key and value weights."""
    ABSORBED = "absorbed_cross_attention"
    """Queries go into the features' space, so keys and values are never computed."""
    SHARED_FIRST_LAYER = "shared_first_layer"
    """Until they first see an image or a text, the queries are computed for one sample."""
    DEAD_ROWS = "dead_rows"
    """Rows that nobody reads are not computed in the last layer."""
    BIAS_IDENTITIES = "bias_identities"
    """The image keys' bias is left out, the image values' bias is added behind the attention."""
    SUPERVISED_ROWS = "supervised_rows"
    """The language-modelling head sees only rows that have a label."""
    JOINED_PROJECTIONS = "joined_projections"
    """Queries, keys and values of self-attention are one product. Saves launches, no FLOPs."""


WORTH_ABSORBING = 3
"""How many times fewer FLOPs the absorbed form of cross-attention must have on a GPU, and in half precision
anywhere. Its products are narrower, and what it writes between them is heads times as wide as keys and
values: on an H200, 32 queries in bf16 take 1.2 to 1.6 times as long in this form at 257 tokens (0.8 times the
FLOPs), 1.15 times at 677 (0.65). On a CPU its scores are products in fp32: on an Intel Xeon with AMX, 1.2 to
2.0 times as long at 257 tokens, 1.2 to 1.4 at 677."""


@dataclass(frozen=True)
class Products:
    """How matrix products are computed.

    Attributes:
        device_type: "cuda" or "cpu".
        half: in half precision, by their operands or under autocast.
    """

    device_type: str = "cpu"
    half: bool = False


@dataclass(frozen=True)
class Architecture:
    """The sizes of a Q-Former.

    Attributes:
        hidden, inner, heads: channels, channels inside a feed-forward network, attention heads.
        cross: a flag a layer: whether it has cross-attention.
        width: channels of the image features.
    """

    hidden: int
    inner: int
    heads: int
    cross: tuple[bool, ...]
    width: int


@dataclass(frozen=True)
class Workload:
    """One pass, in numbers.

    Attributes:
        samples, queries: S and Q; Q = 0 for text alone.
        modes: the mask's mode of each text segment.
        text_rows: real text tokens of each segment, all samples together.
        padded_rows: the same with padding.
        images, image_tokens: distinct images, and tokens of each; 0 without queries.
        looking_rows: query rows that look at these images in all passes together; default those of this one.
        projected: an earlier pass has brought the images' keys and values along.
        gradients: gradients are recorded.
        image_gradients: one of the image features too.
        dropout: hidden states or probabilities are dropped.
        attention_dropout: probabilities are.
        shared_queries: all samples start from the same queries.
        keep_queries, keep_texts: which rows are read of the result (`TokenLayout.select`).
        checkpointed: layers are computed again in the backward.
    """

    samples: int
    queries: int
    modes: tuple[MaskMode, ...] = ()
    text_rows: tuple[int, ...] = ()
    padded_rows: tuple[int, ...] = ()
    images: int = 0
    image_tokens: int = 0
    looking_rows: int | None = None
    projected: bool = False
    gradients: bool = False
    image_gradients: bool = False
    dropout: bool = False
    attention_dropout: bool = False
    shared_queries: bool = True
    keep_queries: bool = True
    keep_texts: tuple[str, ...] = ()
    checkpointed: bool = False

    @property
    def query_rows(self) -> int:
        return self.samples * self.queries

    def kept_rows(self, rows: Sequence[int]) -> tuple[int, tuple[int, ...]]:
        """Query rows and text rows of the result, of segments with `rows` rows."""
        counts = {"none": 0, "first": self.samples, "last": self.samples}
        texts = self.keep_texts or ("all",) * len(rows)
        kept = tuple(counts.get(keep, count) for keep, count in zip(texts, rows, strict=True))
        return self.query_rows if self.keep_queries else 0, kept


@dataclass(frozen=True)
class Hinders:
    """What keeps savings from a Q-Former whose modules were changed: a reason each, or None.

    Attributes:
        first_layer, last_layer: why that layer cannot compute fewer rows.
        some_images: why one layer's image projections cannot be read past.
        every_image: the same where it is so in every layer with cross-attention.
        every_layer: why every layer with cross-attention projects the images itself.
        image_norm: why the image norm cannot be read past.
    """

    first_layer: str | None = None
    last_layer: str | None = None
    some_images: str | None = None
    every_image: str | None = None
    every_layer: str | None = None
    image_norm: str | None = None


@dataclass(frozen=True)
class Decision:
    """Whether a saving applies, and why."""

    applies: bool
    reason: str


@dataclass
class Plan:
    """What is decided for the passes of an encoder.

    Attributes:
        forced: savings that are switched on or off whatever the plan would say.
    """

    forced: dict[Saving, bool] = field(default_factory=dict)

    def force(self, savings: Mapping[str, bool | None]) -> None:
        """Switch savings on or off by name; None leaves one to the plan again.

        Raises:
            ValueError: an unknown name.
            TypeError: a value that is neither a bool nor None.
        """
        for name, value in savings.items():
            if name not in set(Saving):
                expected = ", ".join(repr(saving.value) for saving in Saving)
                raise ValueError(f"savings: expected names among {expected}, got {name!r}")
            if not isinstance(value, bool | None):
                raise TypeError(f"{name}: expected True, False or None, got {describe(value)}")
            if value is None:
                self.forced.pop(Saving(name), None)
            else:
                self.forced[Saving(name)] = value

    def decide(self, saving: Saving, *, hinder: str | None = None, decline: str | None = None) -> Decision:
        """Whether a saving applies.

        Args:
            saving: which.
            hinder: why it would not be exact or possible here, or None.
            decline: why it would not be worth it, or None.

        Raises:
            ValueError: it is forced on and hindered.
        """
        forced = self.forced.get(saving)
        if forced is False:
            return Decision(False, "forced off")
        if hinder is not None:
            if forced:
                raise ValueError(
                    f"{saving}: expected a pass in which it holds, since it is forced on; {hinder}"
                )
            return Decision(False, hinder)
        if forced:
            return Decision(True, "forced on")
        return Decision(decline is None, decline or "")

    # What hinders a saving, apart from modules that must be called as they are (`hinder`).

    def project_once(self, checkpointed: bool, hinder: str | None = None) -> Decision:
        """One projection an image, for all passes and samples."""
        if checkpointed:
            hinder = "checkpointed layers project the images in each pass"
        return self.decide(Saving.PROJECT_ONCE, hinder=hinder)

    def no_image_gradient(self, image_gradients: bool, hinder: str | None = None) -> Decision:
        """The norm folded into the projections."""
        if image_gradients:
            hinder = "the image features require a gradient"
        return self.decide(Saving.NO_IMAGE_GRADIENT, hinder=hinder)

    def absorbed(
        self,
        work: Workload,
        architecture: Architecture,
        hinder: str | None = None,
        products: Products = Products(),
    ) -> Decision:
        """Keys and values never computed: for inference, where few rows look at an image."""
        rows = work.query_rows if work.looking_rows is None else work.looking_rows
        images = (architecture, work.images, work.image_tokens, rows)
        if work.gradients:
            hinder = "a gradient is asked for"
        elif work.attention_dropout:
            hinder = "probabilities are dropped"
        elif not work.images:
            hinder = "no image is read"
        decline = None
        fewer = 1 if products == Products("cpu", half=False) else WORTH_ABSORBING
        if fewer * absorbed_flops(*images) >= projected_flops(*images):
            decline = f"{rows / max(work.images, 1):.4g} rows look at an image: keys and values are cheaper"
        return self.decide(Saving.ABSORBED, hinder=hinder, decline=decline)

    def bias_identities(self, attention_dropout: bool, hinder: str | None = None) -> Decision:
        """The image keys' and values' biases outside the projections."""
        if attention_dropout:
            hinder = "dropped probabilities do not sum to one"
        return self.decide(Saving.BIAS_IDENTITIES, hinder=hinder)

    def shared_first_layer(self, work: Workload, hinder: str | None = None) -> Decision:
        """The queries' part of the first layer for one sample."""
        if not work.queries:
            hinder = "there are no queries"
        elif not work.shared_queries:
            hinder = "samples have queries of their own"
        elif work.dropout:
            hinder = "dropout makes every sample's queries different"
        decline = "there is one sample" if work.samples < 2 else None
        return self.decide(Saving.SHARED_FIRST_LAYER, hinder=hinder, decline=decline)

    def dead_rows(self, work: Workload, hinder: str | None = None) -> Decision:
        """Only the rows that are read, in the last layer."""
        if work.kept_rows(work.text_rows) == (work.query_rows, work.text_rows):
            return self.decide(Saving.DEAD_ROWS, decline="every row is read")
        return self.decide(Saving.DEAD_ROWS, hinder=hinder)

    def joined_projections(self, gradients: bool, prepared: bool, products: Products) -> Decision:
        """The projections of self-attention from weights that lie side by side."""
        hinder = None if prepared else "prepare_inference() was not called"
        if gradients:
            hinder = "a gradient is asked for"
        on_cpu = products.device_type == "cpu"
        decline = "on a CPU one large product takes as long as three" if on_cpu else None
        return self.decide(Saving.JOINED_PROJECTIONS, hinder=hinder, decline=decline)

    def decisions(
        self,
        work: Workload,
        architecture: Architecture,
        *,
        prepared: bool = False,
        products: Products = Products(),
        hinders: Hinders = Hinders(),
    ) -> dict[Saving, Decision]:
        """Every decision for a pass.

        Args:
            work: the pass.
            architecture: of the Q-Former.
            prepared: `FusedEncoder.prepare_inference` was called.
            products: how they are computed.
            hinders: what changed modules stand in the way of; default none.
        """
        unread = None if work.images else "no image is read"
        no_text = None if work.text_rows else "there is no text"
        one_text = None if len(work.text_rows) > 1 else "there is one text at most"
        checkpointed = "layers are checkpointed" if work.checkpointed else None
        return {
            Saving.PROJECT_ONCE: self.project_once(work.checkpointed, hinders.every_layer),
            Saving.PACKED_TEXT: self.decide(Saving.PACKED_TEXT, decline=no_text),
            Saving.ONE_PASS: self.decide(Saving.ONE_PASS, decline=one_text),
            Saving.NO_IMAGE_GRADIENT: self.no_image_gradient(
                work.image_gradients, unread or hinders.image_norm or hinders.every_image
            ),
            Saving.ABSORBED: self.absorbed(work, architecture, checkpointed or hinders.some_images, products),
            Saving.SHARED_FIRST_LAYER: self.shared_first_layer(work, hinders.first_layer),
            Saving.DEAD_ROWS: self.dead_rows(work, hinders.last_layer),
            Saving.BIAS_IDENTITIES: self.bias_identities(work.attention_dropout, hinders.every_image),
            Saving.SUPERVISED_ROWS: self.decide(Saving.SUPERVISED_ROWS),
            Saving.JOINED_PROJECTIONS: self.joined_projections(work.gradients, prepared, products),
        }


# ------------------------------------------------------------------------------------------ what things cost


def projected_flops(architecture: Architecture, images: int, tokens: int, query_rows: int) -> int:
    """Forward FLOPs of cross-attention between its query and its output projection, with keys and values."""
    projection = 2 * images * tokens * architecture.width * architecture.hidden
    core = 2 * query_rows * tokens * architecture.hidden
    return 2 * sum(architecture.cross) * (projection + core)


def absorbed_flops(architecture: Architecture, images: int, tokens: int, query_rows: int) -> int:
    """The same in the absorbed form; how many images there are does not matter."""
    into_space = 2 * query_rows * architecture.hidden * architecture.width
    core = 2 * query_rows * architecture.heads * tokens * architecture.width
    return 2 * sum(architecture.cross) * (into_space + core)


@dataclass(frozen=True)
class Cost:
    """What a pass costs.

    Attributes:
        flops: of all matrix products, two a multiply-add; with the backward where gradients are asked for.
        bytes: of the image-sized tensors it writes, in elements of 4 bytes: normalised features, keys, values
            and their gradients.
    """

    flops: int
    bytes: int


def cost(architecture: Architecture, work: Workload, applied: Mapping[Saving, bool]) -> Cost:
    """What a pass costs with these savings applied; its samples are taken to have equally many rows."""
    C, inner, layers = architecture.hidden, architecture.inner, len(architecture.cross)
    texts = work.text_rows if applied[Saving.PACKED_TEXT] else work.padded_rows
    every = work.query_rows, texts
    kept = work.kept_rows(texts) if applied[Saving.DEAD_ROWS] else every
    joint = MaskMode.BIDIRECTIONAL in work.modes

    rows = core = 0  # multiply-adds of what is done row by row, and of the products inside attention
    for number, cross in enumerate(architecture.cross):
        queries, segments = kept if number == layers - 1 else every
        text = sum(segments)
        shared = applied[Saving.SHARED_FIRST_LAYER] and number == 0
        projected = work.queries if shared else work.query_rows
        asking = work.queries if shared else queries
        attending = work.queries if shared and not joint else queries
        rows += (asking + text + 2 * (projected + sum(texts))) * C * C
        core += _attention_core(work, attending, segments, texts, C)
        rows += (attending + text) * C * C
        if cross and queries:
            rows += (attending + queries) * C * C
        rows += 2 * (queries + text) * C * inner

    projection = image_elements = 0
    frozen = applied[Saving.NO_IMAGE_GRADIENT]
    made_before = work.projected and applied[Saving.PROJECT_ONCE]
    if work.images and frozen and not made_before:
        # The norm's bias, taken through the value weights (and the key weights, unless that cancels).
        taken = 1 if applied[Saving.BIAS_IDENTITIES] or applied[Saving.ABSORBED] else 2
        rows += taken * sum(architecture.cross) * architecture.width * C
    if applied[Saving.ABSORBED]:
        rows += absorbed_flops(architecture, work.images, work.image_tokens, work.query_rows) // 2
        if applied[Saving.SHARED_FIRST_LAYER] and architecture.cross[0] and not joint:
            rows -= (work.query_rows - work.queries) * C * architecture.width
        image_elements = work.images * work.image_tokens * architecture.width
    elif work.queries:
        core += 2 * sum(architecture.cross) * work.query_rows * work.image_tokens * C
        if not made_before:
            tokens = (work.images if applied[Saving.PROJECT_ONCE] else work.samples) * work.image_tokens
            keys = 2 * sum(architecture.cross) * tokens * C
            projection = keys * architecture.width
            image_elements = tokens * architecture.width + keys
            if work.gradients:
                image_elements += keys + (0 if frozen else tokens * architecture.width)
    multiply_adds = rows + core + projection
    if work.gradients:
        # The backward of fused attention computes the scores again: five products to the forward's two.
        multiply_adds += 2 * rows + 5 * core // 2 + (1 if frozen else 2) * projection
    return Cost(2 * multiply_adds, 4 * image_elements)


def _attention_core(
    work: Workload, queries: int, segments: Sequence[int], texts: Sequence[int], C: int
) -> int:
    """Multiply-adds of self-attention's two products, for rows that attend and texts attended to."""
    samples = max(work.samples, 1)
    pairs = queries * work.queries
    for mode, rows, keys in zip(work.modes, segments, texts, strict=True):
        own = rows * keys // samples
        pairs += own if mode == MaskMode.UNIMODAL else own + rows * work.queries
        if mode == MaskMode.BIDIRECTIONAL:
            pairs += queries * keys // samples
    return 2 * pairs * C


def table(architecture: Architecture, work: Workload, decisions: Mapping[Saving, Decision]) -> str:
    """The plan as text: each saving, whether it applies, and what would be computed more without it."""
    applied = {saving: decision.applies for saving, decision in decisions.items()}
    total = cost(architecture, work, applied)
    lines = [("saving", "applies", "FLOPs saved", "image bytes saved", "why not")]
    for saving, decision in decisions.items():
        without = cost(architecture, work, applied | {saving: False})
        flops, size = without.flops - total.flops, without.bytes - total.bytes
        shown = (f"{flops / 1e9:.2f} G", f"{size / 1e6:.1f} MB") if decision.applies else ("", "")
        lines.append((saving, "yes" if decision.applies else "no", *shown, decision.reason))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    rows = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[4]]) for line in lines]
    kind = "forward and backward" if work.gradients else "forward"
    rows.append(f"the pass: {total.flops / 1e9:.2f} GFLOP ({kind}), {total.bytes / 1e6:.1f} MB of image size")
    return "\n".join(row.rstrip() for row in rows)
