"""Where the query rows and the packed text rows of a batch lie in one buffer.

The hidden states of a batch are ONE tensor `[rows, hidden]`: first the query rows (sample by sample), then
the rows of each text segment, sample by sample, without padding:

    | q q q q | q q q q | t t t | t t | c c c c | c c c |
      sample 0  sample 1   text 0   text 1 (segment 0) …(segment 1)

so that projections are one matrix product over all rows and the two feed-forward networks of the Q-Former
work on two contiguous slices.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .checks import (
    INTEGERS,
    check_binary,
    check_bool,
    check_device,
    check_int,
    check_range,
    check_tensor,
    describe,
    values_are_free,
)
from .device_errors import error_count, raise_if_set

QUERY_STREAM = 0
TEXT_STREAM = 1
CAPTION_STREAM = 2

ORDINAL_BITS = 10
SAMPLE_BITS = 19
MAX_ORDINALS = 1 << ORDINAL_BITS
MAX_SAMPLES = 1 << SAMPLE_BITS
MAX_STREAMS = 4

MASK_DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
)

Selection = Literal["all", "first", "last", "none"]


def row_keys(stream: int, samples: Tensor, ordinals: Tensor) -> Tensor:
    """Logical names of rows: `stream << 29 | sample << 10 | ordinal`, int32.

    A row keeps its name however rows are packed, ordered or split into passes, which is what makes dropout
    masks independent of all three.

    Args:
        stream: QUERY_STREAM, TEXT_STREAM, CAPTION_STREAM or 3.
        samples: integer tensor of sample numbers below 2**19.
        ordinals: integer tensor, broadcastable against `samples`: the row's place among its sample's real
            tokens (padding rows count on behind them), below 2**10.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, or (on the CPU) a number out of range.
    """
    check_int("stream", stream, 0, MAX_STREAMS - 1)
    for name, numbers, limit in (("samples", samples, MAX_SAMPLES), ("ordinals", ordinals, MAX_ORDINALS)):
        check_range(name, check_tensor(name, numbers, None, INTEGERS), limit)
    check_tensor("ordinals", ordinals, None, device=samples.device)
    try:
        torch.broadcast_shapes(samples.shape, ordinals.shape)
    except RuntimeError as error:
        raise ValueError(
            f"ordinals: expected a shape that goes with samples, {list(samples.shape)}, got "
            f"{describe(ordinals)}"
        ) from error
    return _row_keys(stream, samples, ordinals)


def _row_keys(stream: int, samples: Tensor, ordinals: Tensor) -> Tensor:
    return ((stream << (SAMPLE_BITS + ORDINAL_BITS)) + samples * MAX_ORDINALS + ordinals).to(torch.int32)


def real_tokens_first(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The order that moves real tokens in front of the padding without changing the order of either.

    Args:
        mask: bool [S, T].

    Returns:
        `source` int64 [S, T]: the column that place i of sample s is filled from; `ordinal` int64 [S, T]: the
        place that column j of sample s goes to (the inverse permutation).

    Raises:
        TypeError, ValueError: a mask of another kind or shape.
    """
    check_tensor("mask", mask, ["samples", "tokens"], [torch.bool])
    source = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    ordinal = torch.empty_like(source)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(source)
    return source, ordinal.scatter_(1, source, places)


def check_text_mask(name: str, mask: object, samples: int | str = "samples") -> Tensor:
    """Check a 0/1 attention mask [S, T] and return it as bool.

    Raises:
        TypeError: not a tensor of a mask's dtype.
        ValueError: not [S, T], or (CPU only) values other than 0 and 1.
    """
    checked = check_tensor(name, mask, [samples, "tokens"], MASK_DTYPES)
    check_binary(name, checked)
    return checked != 0


def padded_row_keys(
    samples: int,
    num_queries: int,
    text_mask: Tensor | None = None,
    *,
    text_stream: int = TEXT_STREAM,
    first_sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Row keys of an ordinary padded batch `[S, Q + T]`, columns in their given order.

    Args:
        samples: S.
        num_queries: Q, may be 0.
        text_mask: 0/1 [S, T], or None for no text.
        text_stream: TEXT_STREAM or CAPTION_STREAM.
        first_sample: number of the first sample, so that a second pass of a step can have names of its own.
        device: where to make them; default the mask's.

    Returns:
        int32 [S, Q + T].

    Raises:
        TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
    """
    _check_names(samples, num_queries, first_sample)
    check_int("text_stream", text_stream, 1, MAX_STREAMS - 1)
    if device is not None:
        device = check_device("device", device)
    if text_mask is not None:
        real = check_text_mask("text_mask", text_mask, samples)
        device = real.device
    sample = torch.arange(first_sample, first_sample + samples, device=device)[:, None]
    keys = [_row_keys(QUERY_STREAM, sample, torch.arange(num_queries, device=device)[None, :])]
    if text_mask is not None:
        _, ordinal = real_tokens_first(real)
        check_int("text_mask.shape[1]", ordinal.shape[1], 0, MAX_ORDINALS)
        keys.append(_row_keys(text_stream, sample, ordinal))
    return torch.cat(keys, dim=1)


@dataclass(frozen=True)
class TextSegment:
    """The text rows of a batch: those of sample s are `offsets[s] … offsets[s + 1]` within the segment.

    Attributes:
        offsets: int32 [S + 1].
        lengths: int32 [S], real tokens of each sample; only these are attended to. In a padded layout the
            rows of a sample go on behind them.
        max_length: host int, the most rows any one sample has.
        rows: host int, rows in the segment.
        source: int64 [rows], the place of each row in the flattened padded batch [S * width].
        width: host int, columns of the padded batch it was made from.
    """

    offsets: Tensor
    lengths: Tensor
    max_length: int
    rows: int
    source: Tensor
    width: int


@dataclass(frozen=True)
class DenseRows:
    """The rows of a layout as a rectangle [S, L], L = Q + the segments' max_length: how dense code sees it.

    Attributes:
        place: int64 [rows], the flat place of each row in the rectangle [S * L].
        exists: bool [S, L], False where a sample has no row.
        real: bool [S, L], True for queries and for real text tokens: the rows that may be attended to.
        ordinal: int64 [S, L], place of the row among its sample's real tokens; 0 where there is no row.
        segment: int64 [L], -1 for queries, else the number of the text segment.
        row_keys: int32 [S, L], 0 where there is no row.
    """

    place: Tensor
    exists: Tensor
    real: Tensor
    ordinal: Tensor
    segment: Tensor
    row_keys: Tensor

    def spread(self, rows: Tensor) -> Tensor:
        """Rows [rows, ...] laid out as [S, L, ...]; 0 where there is no row."""
        if self.exists.shape[0] == 1:  # a sample alone has its rows in this order
            return rows.unflatten(0, self.exists.shape)
        dense = rows.new_zeros(self.exists.numel(), *rows.shape[1:]).index_copy(0, self.place, rows)
        return dense.unflatten(0, self.exists.shape)

    def collect(self, dense: Tensor) -> Tensor:
        """The inverse: [S, L, ...] back to rows [rows, ...]."""
        rows = dense.flatten(0, 1)
        return rows.contiguous() if self.exists.shape[0] == 1 else rows.index_select(0, self.place)


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Where queries and packed texts lie in one buffer `[rows, hidden]`.

    Build it with `from_attention_masks`. Its tensors are not written to: what is made of them on a CPU may be
    kept as long as it lives. A layout equals itself alone. Q = 0 (text only) and no text segment
    (queries only) are ordinary.

    Attributes:
        num_queries: Q.
        samples: S.
        texts: the text segments, in buffer order.
        row_keys: int32 [rows], the logical name of each row (see `row_keys`).
        padded: every sample has `width` rows in a segment, padding behind its real tokens: static shapes. A
            padding row attends as a real row in its place would; no row attends to it.
        consecutive: the ordinals of each sample's rows in a segment are 0, 1, 2 …, as always but for a
            selection of last rows.
        selected_from: the row keys of the layout that `select` took these rows from; None elsewhere.
    """

    num_queries: int
    samples: int
    texts: tuple[TextSegment, ...]
    row_keys: Tensor
    padded: bool = False
    consecutive: bool = True
    selected_from: Tensor | None = field(default=None, repr=False)

    @classmethod
    def from_attention_masks(
        cls,
        num_queries: int,
        text_masks: Sequence[Tensor] = (),
        *,
        samples: int | None = None,
        padded: bool = False,
        text_streams: Sequence[int] | None = None,
        first_sample: int = 0,
        device: torch.device | str | None = None,
    ) -> "TokenLayout":
        """Build the layout of a batch from its 0/1 attention masks.

        Padding may be left, right or scattered: positions are embedded before rows are packed, and the order
        of the real tokens is kept. Masks on a CUDA device cost one synchronisation for the packed layout and
        none for the padded one; masks on the CPU none, whatever `device` is.

        Args:
            num_queries: Q >= 0.
            text_masks: one [S, T] mask a text segment.
            samples: S; needed only where there is no text.
            padded: keep the padding rows (behind the real ones): static shapes.
            text_streams: a stream a segment; default TEXT_STREAM, CAPTION_STREAM.
            first_sample: number of the first sample in the row keys.
            device: where the layout's tensors live; default the masks' device.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value, named in the message.
        """
        for name, values in (("text_masks", text_masks), ("text_streams", text_streams or ())):
            if isinstance(values, str | Tensor) or not isinstance(values, Sequence):
                raise TypeError(f"{name}: expected a sequence, one entry a segment, got {describe(values)}")
        check_bool("padded", padded)
        if not text_masks and samples is None:
            raise ValueError("samples: expected an int where there is no text mask, got None")
        if samples is None:
            samples = check_tensor("text_masks[0]", text_masks[0], ["samples", "tokens"]).shape[0]
        _check_names(samples, num_queries, first_sample)
        default_streams = (TEXT_STREAM, CAPTION_STREAM)[: len(text_masks)]
        streams = default_streams if text_streams is None else tuple(text_streams)
        if len(streams) != len(text_masks):
            raise ValueError(f"text_streams: expected {len(text_masks)}, one a text mask, got {len(streams)}")
        for stream in streams:
            check_int("text_streams", stream, 0)
        if len(set(streams)) != len(streams) or any(not 0 < stream < MAX_STREAMS for stream in streams):
            raise ValueError(f"text_streams: expected distinct values in [1, {MAX_STREAMS}), got {streams}")
        if device is None:
            device = text_masks[0].device if text_masks else torch.device("cpu")
        device = check_device("device", device)

        home = text_masks[0].device if text_masks else device
        sample = torch.arange(first_sample, first_sample + samples, device=home)[:, None]
        keys = [_row_keys(QUERY_STREAM, sample, torch.arange(num_queries, device=home)[None, :]).flatten()]
        texts: list[TextSegment] = []
        for i, (mask, stream) in enumerate(zip(text_masks, streams, strict=True)):
            if i == 0 or mask is not text_masks[i - 1]:  # two texts of one mask lie alike
                real = check_text_mask(f"text_masks[{i}]", mask, samples)
                check_int(f"text_masks[{i}].shape[1]", real.shape[1], 0, MAX_ORDINALS)
                segment, ordinal = _text_segment(real, padded)
            texts.append(_move(segment, device))
            keys.append(_row_keys(stream, sample.flatten()[segment.source // max(segment.width, 1)], ordinal))
        return cls(num_queries, samples, tuple(texts), torch.cat(keys).to(device, non_blocking=True), padded)

    @property
    def query_rows(self) -> int:
        """Rows that belong to queries: S * Q."""
        return self.samples * self.num_queries

    @property
    def rows(self) -> int:
        """Rows of the whole buffer."""
        return self.query_rows + sum(text.rows for text in self.texts)

    @property
    def device(self) -> torch.device:
        return self.row_keys.device

    def text_start(self, segment: int) -> int:
        """Number of the first row of a text segment."""
        self._segment(segment)
        return self.query_rows + sum(text.rows for text in self.texts[:segment])

    def pack(self, queries: Tensor | None, texts: Sequence[Tensor] = ()) -> Tensor:
        """Lay padded tensors into the buffer.

        Args:
            queries: [S, Q, C], or None where Q = 0.
            texts: a [S, width, C] tensor a segment.

        Returns:
            [rows, C], same dtype.

        Raises:
            TypeError, ValueError: a tensor that does not fit this layout, or lies on another device.
        """
        self._check_one_a_segment(texts)
        parts = []
        if self.num_queries or not self.texts:
            shape = [self.samples, self.num_queries, "channels"]
            check_tensor("queries", queries, shape, device=self.device)
            parts.append(queries.flatten(0, 1))
        for i, (text, segment) in enumerate(zip(texts, self.texts, strict=True)):
            channels = parts[0].shape[1] if parts else "channels"
            dtypes = [parts[0].dtype] if parts else []
            check_tensor(f"texts[{i}]", text, [self.samples, segment.width, channels], dtypes, self.device)
            parts.append(text.flatten(0, 1).index_select(0, segment.source))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def unpack_queries(self, rows: Tensor) -> Tensor:
        """The query rows of rows [rows, C] as a view [S, Q, C]."""
        self._check_rows(rows)
        return rows[: self.query_rows].view(self.samples, self.num_queries, *rows.shape[1:])

    def unpack_text(self, rows: Tensor, segment: int = 0) -> Tensor:
        """The rows of a text segment in their padded places, [S, width, C]; 0 where padding was dropped."""
        self._check_rows(rows)
        text = self._segment(segment)
        start = self.text_start(segment)
        padded = rows.new_zeros(self.samples * text.width, *rows.shape[1:])
        padded = padded.index_copy(0, text.source, rows[start : start + text.rows])
        return padded.unflatten(0, (self.samples, text.width))

    def first_rows(self, segment: int = 0) -> Tensor:
        """Row numbers int64 [S] of each sample's first real token ([CLS]); every sample must have one."""
        _check_no_sample_is_empty("segment", "one where", self._segment(segment))
        return self.text_start(segment) + self.texts[segment].offsets[:-1].long()

    def _segment(self, segment: int) -> TextSegment:
        return self.texts[check_int("segment", segment, 0, len(self.texts) - 1)]

    def _check_rows(self, rows: Tensor) -> None:
        if not isinstance(rows, Tensor):
            raise TypeError(f"rows: expected a tensor [{self.rows}, ...], got {describe(rows)}")
        if rows.dim() == 0 or rows.shape[0] != self.rows:
            raise ValueError(f"rows: expected [{self.rows}, ...], got {describe(rows)}")
        check_tensor("rows", rows, None, device=self.device)

    def _check_one_a_segment(self, texts: object) -> None:
        if isinstance(texts, str | Tensor) or not isinstance(texts, Sequence):
            raise TypeError(f"texts: expected a sequence, one entry a text segment, got {describe(texts)}")
        if len(texts) != len(self.texts):
            raise ValueError(f"texts: expected {len(self.texts)}, one a text segment, got {len(texts)}")

    def select(
        self, *, queries: bool = True, texts: Sequence[Selection] | None = None
    ) -> tuple["TokenLayout", Tensor]:
        """The layout of a subset of the rows: what the query side of an attention keeps of its key side.

        Args:
            queries: keep the query rows.
            texts: for each segment "all", "none", or the "first" / "last" real row of each sample (no
                sample may be empty then). Default all.

        Returns:
            The layout, and int64 [its rows]: their numbers in this layout's buffer.

        Raises:
            TypeError, ValueError: not one choice a segment, another word, or (on the CPU) the "first" or
            "last" row of a sample that has none.
        """
        check_bool("queries", queries)
        texts = ["all"] * len(self.texts) if texts is None else texts
        self._check_one_a_segment(texts)
        kept = [torch.arange(self.query_rows if queries else 0, device=self.device)]
        segments = []
        for i, (choice, text) in enumerate(zip(texts, self.texts, strict=True)):
            start = self.text_start(i)
            if choice == "all":
                within, segment = torch.arange(text.rows, device=self.device), text
            elif choice == "none":
                within = torch.arange(0, device=self.device)
                empty = torch.zeros_like(text.offsets)
                segment = TextSegment(empty, empty[1:], 0, 0, text.source[:0], text.width)
            elif choice in ("first", "last"):
                _check_no_sample_is_empty(f"texts[{i}]", f"{choice!r} only where", text)
                within = text.offsets[:-1].long() + (0 if choice == "first" else text.lengths.long() - 1)
                ones = torch.ones_like(text.lengths)
                offsets = torch.arange(self.samples + 1, dtype=torch.int32, device=self.device)
                segment = TextSegment(offsets, ones, 1, self.samples, text.source[within], text.width)
            else:
                raise ValueError(f"texts[{i}]: expected 'all', 'first', 'last' or 'none', got {choice!r}")
            kept.append(start + within)
            segments.append(segment)
        index = torch.cat(kept)
        num_queries = self.num_queries if queries else 0
        consecutive = self.consecutive and "last" not in texts
        names = self.row_keys[index]
        layout = TokenLayout(
            num_queries, self.samples, tuple(segments), names, self.padded, consecutive, self.row_keys
        )
        return layout, index

    def dense(self) -> DenseRows:
        """The rows as a rectangle [S, L]: the form of the reference and of plots."""
        width = self.num_queries + sum(text.max_length for text in self.texts)
        samples = torch.arange(self.samples, device=self.device)[:, None]
        every = torch.ones(self.samples, self.num_queries, dtype=torch.bool, device=self.device)
        place = [(samples * width + torch.arange(self.num_queries, device=self.device)).flatten()]
        exists, real = [every], [every]
        segment = [torch.full((self.num_queries,), -1, device=self.device)]
        column = self.num_queries
        for i, text in enumerate(self.texts):
            offsets = text.offsets.long()
            sample = text.source // max(text.width, 1)
            within = torch.arange(text.rows, device=self.device) - offsets[sample]
            place.append(sample * width + column + within)
            places = torch.arange(text.max_length, device=self.device)
            exists.append(places < offsets.diff()[:, None])
            real.append(places < text.lengths[:, None])
            segment.append(torch.full((text.max_length,), i, device=self.device))
            column += text.max_length
        flat = torch.cat(place)
        names = torch.zeros(self.samples * width, dtype=torch.int32, device=self.device)
        names = names.index_copy(0, flat, self.row_keys).unflatten(0, (self.samples, width))
        ordinal = names.long() % MAX_ORDINALS
        return DenseRows(flat, torch.cat(exists, 1), torch.cat(real, 1), ordinal, torch.cat(segment), names)


def read_sizes(sizes: Tensor) -> tuple[int, int, int]:
    """Three numbers of a device on the host: where a layout waits for the device, and nowhere else."""
    rows, max_length, errors = map(int, sizes.tolist())
    return rows, max_length, errors


def _check_names(samples: int, num_queries: int, first_sample: int) -> None:
    check_int("num_queries", num_queries, 0, MAX_ORDINALS)
    check_int("first_sample", first_sample, 0, MAX_SAMPLES)
    check_int("samples", samples, 0, MAX_SAMPLES - first_sample)


def _check_no_sample_is_empty(name: str, wanted: str, text: TextSegment) -> None:
    """On the CPU: the row in the place of an empty sample's would be another sample's, or padding."""
    if values_are_free(text.lengths.device) and not bool(text.lengths.all()):
        sample = int((text.lengths == 0).nonzero()[0])
        raise ValueError(
            f"{name}: expected {wanted} every sample has a real token, got none in sample {sample}"
        )


def _move(segment: TextSegment, device: torch.device) -> TextSegment:
    moved = [t.to(device, non_blocking=True) for t in (segment.offsets, segment.lengths, segment.source)]
    return TextSegment(moved[0], moved[1], segment.max_length, segment.rows, moved[2], segment.width)


def _text_segment(mask: Tensor, padded: bool) -> tuple[TextSegment, Tensor]:
    """The segment of a bool mask [S, T], and the ordinals int64 [rows] of its rows."""
    samples, width = mask.shape
    source, _ = real_tokens_first(mask)
    source = source + torch.arange(samples, device=mask.device)[:, None] * width
    places = torch.arange(width, device=mask.device).expand(samples, -1)
    lengths = mask.sum(1, dtype=torch.int32)
    if padded:
        offsets = torch.arange(samples + 1, dtype=torch.int32, device=mask.device) * width
        segment = TextSegment(offsets, lengths, width, samples * width, source.flatten(), width)
        return segment, places.flatten()
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    # The one synchronisation of a layout built from a device mask: both sizes in one transfer, and with them
    # what kernels found wrong so far.
    sizes = torch.stack([offsets[-1], lengths.max() if samples else offsets[-1], error_count(mask.device)])
    rows, max_length, errors = read_sizes(sizes)
    raise_if_set(mask.device, errors)
    # A scatter with one spill slot instead of boolean indexing, which would synchronise again.
    destination = torch.where(places < lengths[:, None], offsets[:-1, None].long() + places, rows).flatten()
    packed = torch.empty(2, rows + 1, dtype=torch.int64, device=mask.device)
    packed[0].scatter_(0, destination, source.flatten())
    packed[1].scatter_(0, destination, places.flatten())
    segment = TextSegment(offsets, lengths, max_length, rows, packed[0, :rows], width)
    return segment, packed[1, :rows]
