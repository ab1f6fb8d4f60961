"""The whole Q-Former on packed rows."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import INTEGERS, check_binary, check_int, check_tensor, describe
from ..layout import MASK_DTYPES, Selection, TokenLayout
from ..mask import AttentionMask
from ..ops.dense_attention import autocasts
from ..ops.image_arguments import check_image_index
from ..ops.philox import Site, draw_key
from .embeddings import first_rows
from .images import ImageFeatures, ImageKeyValues, KeyValues, project
from .layer import (
    CallLayer,
    Pass,
    Selected,
    call_whole,
    cross_attention_part,
    feed_forward_part,
    parameters_of_dead_rows,
    self_attention_part,
    shared_self_attention_part,
)
from .modules import (
    bypass_reason,
    changes,
    checkpoints,
    drops,
    first_norm_owner,
    hinders,
    image_hinders,
    image_norm_reason,
    projections_reason,
    row_hinders,
)
from .plan import Architecture, Plan, Products, Saving, Workload, table
from .rows import EncodedRows
from .weights import Fold, FoldedLinear, Join, WeightCache, with_zero_gradients


class FusedEncoder:
    """Runs a Q-Former on the rows of a `TokenLayout`, computing nothing twice and nothing that is not read.

    It holds no parameters: it reads those of the module it is given, under the names that transformers'
    `Blip2QFormerModel` and `InstructBlipQFormerModel` use, at every call. Where dropout is on, every mask
    comes from the Philox contract, so the result equals the padded plain path's in training too.

    Linear layers, norms and activations are called as the modules they are wherever a saving does not need
    to read past them. A layer that was changed (hooks, another class, another `forward`) is called whole, on
    padded rows, through `call_layer`.

    Args:
        qformer: a Q-Former with `config`, `encoder.layer` and `layernorm` or `embeddings.layernorm`. With a
            true attribute `gradient_checkpointing` its layers are computed again in the backward.
        call_layer: how to call one of its layers; None where that is not known, and changed layers are
            refused.
        backend: of the attentions: "auto" (for each the first that can serve it), "triton", "torch" or
            "reference"; one that cannot serve a call raises ValueError.
    """

    def __init__(
        self, qformer: nn.Module, call_layer: CallLayer | None = None, backend: str = "auto"
    ) -> None:
        self.qformer = qformer
        self.call_layer = call_layer
        self.backend = backend
        self.plan = Plan()
        self._cache: WeightCache | None = None

    # ----------------------------------------------------------------------------------------------- the plan

    def force(self, **savings: bool | None) -> "FusedEncoder":
        """Switch savings on or off by name (`Saving`), whatever the plan says; None gives one back to it.

        Returns:
            This encoder.

        Raises:
            ValueError: an unknown name. A saving that is forced on where it does not hold raises when it is
                met.
            TypeError: a value that is neither a bool nor None.
        """
        self.plan.force(savings)
        return self

    def uses(self, saving: Saving) -> bool:
        """Whether a saving is used by whoever lays out the passes (`packed_text`, `one_pass`,
        `supervised_rows`): yes, unless it is forced off."""
        return self.plan.decide(saving).applies

    @property
    def architecture(self) -> Architecture:
        """The sizes of the Q-Former."""
        config = self.qformer.config
        cross = tuple(hasattr(layer, "crossattention") for layer in self.qformer.encoder.layer)
        return Architecture(
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            cross,
            config.encoder_hidden_size,
        )

    def explain(self, work: Workload, norm: nn.LayerNorm | None = None) -> str:
        """The plan of a pass as a table: which savings apply, what each saves, and why not.

        Modules that were changed are listed below it, with what is declined because of them.

        Args:
            work: the pass. Dropout and checkpointed layers count where the Q-Former has them on now, too.
            norm: the image LayerNorm that `project_images` would get; default one as it was built.

        Raises:
            TypeError: `work` is no Workload.
            ValueError: a saving is forced on where it does not hold.
        """
        if not isinstance(work, Workload):
            raise TypeError(f"work: expected a Workload, got {describe(work)}")
        layers = self.qformer.encoder.layer
        work = replace(
            work,
            dropout=work.dropout or drops(self.qformer),
            attention_dropout=work.attention_dropout or any(map(self._drops_probabilities, layers)),
            checkpointed=work.checkpointed or (work.gradients and checkpoints(self.qformer)),
        )
        whole = [bypass_reason(layer) for layer in layers]
        decisions = self.plan.decisions(
            work,
            self.architecture,
            prepared=self._cache is not None,
            products=self._products,
            hinders=hinders(self.qformer, whole, norm),
        )
        lines = [table(self.architecture, work, decisions)]
        joined = decisions[Saving.JOINED_PROJECTIONS].applies
        return "\n".join(lines + changes(self.qformer, whole, joined=joined))

    def prepare_inference(self) -> "FusedEncoder":
        """Keep weights that are made from other weights between calls without gradients.

        A parameter that is replaced, moved or written to is noticed, and what was made of it is made anew.
        Writes through `.data` are not noticed, since torch does not count them: call this again then.

        Returns:
            This encoder.
        """
        self._cache = WeightCache()
        return self

    @property
    def _fold(self) -> Fold:
        return FoldedLinear.fold if self._cache is None else self._cache.fold

    @property
    def _join(self) -> Join | None:
        how = (torch.is_grad_enabled(), self._cache is not None, self._products)
        applies = self.plan.joined_projections(*how).applies
        return self._cache.joined if applies and self._cache is not None else None

    @property
    def _products(self) -> Products:
        # Of whichever parameter there is: a wrapped or quantised linear layer need not have any.
        parameter = next(self.qformer.parameters(), None)
        if parameter is None:
            return Products()
        half = parameter.dtype in (torch.float16, torch.bfloat16) or autocasts(parameter.device)
        return Products(parameter.device.type, half)

    # --------------------------------------------------------------------------------------------- the images

    def project_images(
        self,
        features: Tensor,
        *,
        norm: nn.LayerNorm | None = None,
        mask: Tensor | None = None,
        query_rows: int | None = None,
        frozen: bool | None = None,
    ) -> ImageKeyValues:
        """Get images [images, tokens, width] ready for every layer and every pass that looks at them.

        Args:
            features: image features; behind the image LayerNorm, or in front of it where `norm` is given.
            norm: the image LayerNorm. Its weight and bias are folded into the projections where the features
                need no gradient.
            mask: 0/1 [images, tokens] of visible tokens; default all.
            query_rows: how many will look at them, in all passes together; decides whether keys and values
                are projected or the absorbed form is taken. Default: projected.
            frozen: whether the features come from a frozen encoder; default whether they need no gradient.

        Raises:
            TypeError, ValueError: features or mask of the wrong kind, shape or width; `frozen` that does not
                match `features.requires_grad`; a saving forced on where it does not hold.
        """
        config, layers = self.qformer.config, self.qformer.encoder.layer
        check_tensor("encoder_hidden_states", features, ["images", "tokens", config.encoder_hidden_size])
        images, tokens, _ = features.shape
        if mask is not None:
            check_tensor("encoder_attention_mask", mask, [images, tokens], MASK_DTYPES, features.device)
            check_binary("encoder_attention_mask", mask)
        if query_rows is not None:
            check_int("query_rows", query_rows, 0)
        image_gradients = features.requires_grad and torch.is_grad_enabled()
        if frozen is not None and frozen == image_gradients:
            came = "requires_grad=True" if image_gradients else "requires_grad=False"
            raise ValueError(f"frozen: expected {not frozen} for features with {came}, got {frozen}")

        whole = [bypass_reason(layer) if hasattr(layer, "crossattention") else None for layer in layers]
        changed = next(filter(None, image_hinders(layers, whole)), None)
        source = self._source(features, norm, image_gradients, changed is not None)
        absorbed = self._absorbs(source, query_rows, changed)
        checkpointed = checkpoints(self.qformer)
        once = self.plan.project_once(checkpointed).applies
        project_now = once and not absorbed
        made = tuple(self._project(layer, source) if project_now else None for layer in layers)
        return ImageKeyValues(
            source,
            made,
            mask,
            self.qformer,
            absorbed,
            shared=once or absorbed or checkpointed,
            cut_from=() if torch.is_grad_enabled() else tuple(self._made_of(features, norm, source, made)),
        )

    def _made_of(
        self,
        features: Tensor,
        norm: nn.LayerNorm | None,
        source: ImageFeatures,
        made: Sequence[KeyValues | None],
    ) -> Iterator[Tensor]:
        """The tensors that have been computed with when images were projected."""
        if features.requires_grad:  # else they would live on for nothing
            yield features
        projected = [
            layer.crossattention.attention
            for layer, key_values in zip(self.qformer.encoder.layer, made, strict=True)
            if key_values is not None
        ]
        if norm is not None and (projected or source.norm is None or source.whole is not None):
            yield from norm.parameters()
        for attention in projected:
            yield from attention.key.parameters()
            yield from attention.value.parameters()

    def _source(
        self, features: Tensor, norm: nn.LayerNorm | None, image_gradients: bool, keep_whole: bool
    ) -> ImageFeatures:
        """The features as the layers will read them."""
        if norm is None:
            return ImageFeatures(features)
        features = features.to(norm.weight.dtype)
        if self.plan.no_image_gradient(image_gradients, image_norm_reason(norm)).applies:
            return ImageFeatures.normalized(features, norm, keep_whole=keep_whole)
        return ImageFeatures(norm(features))

    def _absorbs(self, source: ImageFeatures, query_rows: int | None, hinder: str | None) -> bool:
        """Whether cross-attention takes the absorbed form on these images."""
        if query_rows is None and not self.plan.forced.get(Saving.ABSORBED):
            return False
        images, tokens, _ = source.values.shape
        # Whether queries that will look need a gradient is not known yet, though every parameter be frozen.
        work = Workload(
            0,
            0,
            images=images,
            image_tokens=tokens,
            looking_rows=query_rows or 0,
            gradients=torch.is_grad_enabled(),
            attention_dropout=any(map(self._drops_probabilities, self.qformer.encoder.layer)),
        )
        return self.plan.absorbed(work, self.architecture, hinder, self._products).applies

    def _project(self, layer: nn.Module, features: ImageFeatures) -> KeyValues | None:
        """A layer's keys and values; None where it has none or is called whole."""
        if not hasattr(layer, "crossattention") or bypass_reason(layer) is not None:
            return None
        attention = layer.crossattention.attention
        return project(
            attention,
            self.qformer.config.num_attention_heads,
            features,
            read_weights=projections_reason(attention) is None,
            bias_identities=self.plan.bias_identities(self._drops_probabilities(layer)).applies,
            fold=self._fold,
        )

    def _drops_probabilities(self, layer: nn.Module) -> bool:
        """Whether a layer's cross-attention would apply dropout now."""
        cross = getattr(layer, "crossattention", None)
        return cross is not None and drops(self.qformer) and cross.attention.attention_dropout > 0

    # ------------------------------------------------------------------------------------------------- a pass

    def __call__(
        self,
        queries: Tensor | None,
        texts: Sequence[Tensor],
        layout: TokenLayout,
        mask: AttentionMask,
        images: ImageKeyValues | None = None,
        image_index: Tensor | None = None,
        *,
        embeddings: nn.Module | None = None,
        position_ids: Sequence[Tensor | None] | None = None,
        keep_queries: bool = True,
        keep_texts: Sequence[Selection] | None = None,
        dropout_key: Tensor | None = None,
    ) -> EncodedRows:
        """Encode queries and texts.

        Args:
            queries: query tokens before the first LayerNorm, [S, Q, hidden], or [1, Q, hidden] where all
                samples start from the same; None where Q = 0.
            texts: embedded text (word + position) before the first LayerNorm, the packed rows [rows, hidden]
                of each segment; with `embeddings` the token ids, integers [S, width] of each segment.
            layout: where the rows lie.
            mask: one mode a text segment.
            images: from `project_images`; needed where there are queries, None where there are none.
            image_index: int32 [S] in [0, images); default sample s looks at image s.
            embeddings: what embeds token ids: `embeddings(ids [1, n], positions [1, n])` gives word +
                position [1, n, hidden], from tables `word_embeddings` and `position_embeddings`.
                None where texts come embedded.
            position_ids: with `embeddings`, integers [S or 1, width] of each segment; default 0, 1, 2 ...
            keep_queries, keep_texts: which rows of the result are read, as in `TokenLayout.select`; default
                all.
            dropout_key: int64 [] from `draw_key`, so that several passes can share a step's key; default a
                new one where the Q-Former is training with dropout.

        Returns:
            `EncodedRows`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind or shape, parts that do not belong together,
                or a saving that is forced on where it does not hold.
        """
        queries, texts = self._check(
            queries, texts, layout, mask, images, image_index, embeddings, position_ids
        )
        layers = self.qformer.encoder.layer
        keep = tuple(["all"] * len(texts) if keep_texts is None else keep_texts)
        key = None
        if drops(self.qformer):
            key = draw_key(layout.device) if dropout_key is None else dropout_key
        heads = self.qformer.config.num_attention_heads
        run = Pass(layout, mask, heads, images, image_index, key, self._fold, self._join, self.backend)
        kept = Selected.of(layout, keep_queries, keep)
        whole = [bypass_reason(layer) for layer in layers]
        shared, early = self._decide(run, queries, kept is not None, whole, keep_queries, keep)

        checkpointed = checkpoints(self.qformer)
        owner = first_norm_owner(self.qformer)
        drop = run.hidden_dropout(owner.dropout, layout.row_keys, 0, Site.EMBEDDINGS)
        hidden = first_rows(
            owner.layernorm,
            embeddings,
            queries,
            texts,
            position_ids,
            layout,
            drop,
            expand_queries=not shared,
        )
        for number, layer in enumerate(layers):
            if whole[number] is not None:
                if self.call_layer is None:
                    raise ValueError(
                        "qformer: expected layers as they were built, or a call_layer, got a layer "
                        f"{number} that must be called whole: {whole[number]}"
                    )
                hidden = call_whole(layer, hidden, run, self.call_layer)
                continue
            selected = kept if early and number == len(layers) - 1 else None
            arguments = (layer, number, hidden, run, shared and number == 0, selected)
            if checkpointed:
                hidden = checkpoint(self._layer, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden = self._layer(*arguments)
        if kept is None:
            return EncodedRows(hidden, layout)
        return EncodedRows(hidden if early else hidden.index_select(0, kept.index), kept.layout)

    def _layer(
        self, layer: nn.Module, number: int, hidden: Tensor, run: Pass, shared: bool, kept: Selected | None
    ) -> Tensor:
        """One layer. With `shared` the buffer holds one sample's queries and the text rows."""
        layout = run.layout if kept is None else kept.layout
        queries: Tensor | None
        if shared:
            count = run.layout.num_queries
            text = hidden[count:] if hidden.shape[0] > count else None
            queries, text = shared_self_attention_part(layer, hidden[:count], text, run)
        else:
            rows = self_attention_part(layer, number, hidden, run, kept)
            count = layout.query_rows
            queries = rows[:count] if count else None
            text = rows[count:] if rows.shape[0] > count else None
        if queries is not None:
            if hasattr(layer, "crossattention"):
                names = layout.row_keys[: layout.query_rows]
                images = self._key_values(layer, number, run)
                queries = cross_attention_part(layer, number, queries, names, run, images)
            elif queries.shape[0] < layout.query_rows:
                queries = queries.repeat(layout.samples, 1)
        if queries is None and text is None:
            return hidden[:0]
        rows = feed_forward_part(layer, number, queries, text, layout.row_keys, run)
        if kept is None:
            return rows
        return with_zero_gradients(rows, parameters_of_dead_rows(layer, queries, text, run.layout))

    def _key_values(self, layer: nn.Module, number: int, run: Pass) -> KeyValues | None:
        """A layer's keys and values, made here where they were not before; None for the absorbed form."""
        images = run.images
        if images.layers[number] is not None:
            return images.layers[number]
        if images.absorbed:
            return None
        features = images.features
        if not images.shared and run.image_index is not None:
            features = features.of_samples(run.image_index)
        return self._project(layer, features)

    def _decide(
        self,
        run: Pass,
        queries: Tensor | None,
        some_rows: bool,
        whole: Sequence[str | None],
        keep_queries: bool,
        keep_texts: tuple[Selection, ...],
    ) -> tuple[bool, bool]:
        """Whether the first layer's queries are shared, and the last layer computes kept rows only."""
        layout = run.layout
        rows = tuple(text.rows for text in layout.texts)
        work = Workload(
            layout.samples,
            layout.num_queries,
            run.mask.modes,
            rows,
            rows,
            dropout=run.dropout_key is not None,
            shared_queries=queries is not None and queries.shape[0] == 1,
            keep_queries=keep_queries,
            keep_texts=keep_texts,
        )
        first, last = row_hinders(whole)
        early = some_rows and self.plan.dead_rows(work, last).applies
        return self.plan.shared_first_layer(work, first).applies, early

    def _check(
        self,
        queries: Tensor | None,
        texts: Sequence[Tensor],
        layout: TokenLayout,
        mask: AttentionMask,
        images: ImageKeyValues | None,
        image_index: Tensor | None,
        embeddings: nn.Module | None,
        position_ids: Sequence[Tensor | None] | None,
    ) -> tuple[Tensor | None, list[Tensor]]:
        hidden = self.qformer.config.hidden_size
        if not isinstance(layout, TokenLayout):
            raise TypeError(f"layout: expected a TokenLayout, got {describe(layout)}")
        if not isinstance(mask, AttentionMask):
            raise TypeError(f"mask: expected an AttentionMask, got {describe(mask)}")
        mask.check(layout)
        if len(texts) != len(layout.texts):
            raise ValueError(f"texts: expected {len(layout.texts)}, one a text segment, got {len(texts)}")
        if position_ids is not None and embeddings is None:
            raise ValueError("position_ids: expected embeddings beside it, got None")
        for i, (text, segment) in enumerate(zip(texts, layout.texts, strict=True)):
            if embeddings is None:
                check_tensor(f"texts[{i}]", text, [segment.rows, hidden], device=layout.device)
            else:
                check_tensor(f"texts[{i}]", text, [layout.samples, segment.width], INTEGERS, layout.device)
        if not layout.num_queries:
            given = {"queries": queries, "images": images, "image_index": image_index}
            for name, value in given.items():
                if value is not None:
                    raise ValueError(
                        f"{name}: expected None for a layout without queries, got {describe(value)}"
                    )
            return None, list(texts)
        check_tensor("queries", queries, ["S or 1", layout.num_queries, hidden], device=layout.device)
        if queries.shape[0] not in (1, layout.samples):
            expected = f"[{layout.samples} or 1, {layout.num_queries}, {hidden}]"
            raise ValueError(f"queries: expected {expected}, got {list(queries.shape)}")
        if not isinstance(images, ImageKeyValues):
            raise ValueError(
                f"images: expected ImageKeyValues where there are queries, got {describe(images)}"
            )
        self._check_images(images)
        # Here and not only in the ops: a layer that is called whole picks its images itself.
        check_image_index(image_index, layout.samples, images.images, layout.device, validate=False)
        return queries, list(texts)

    def _check_images(self, images: ImageKeyValues) -> None:
        """Refuse images that were made for something else than this pass."""
        if images.owner is not self.qformer:
            raise ValueError("images: expected what this Q-Former projected, got what another one did")
        for layer, made in zip(self.qformer.encoder.layer, images.layers, strict=True):
            undropped = images.absorbed if made is None else made.context_bias is not None
            if undropped and self._drops_probabilities(layer):
                raise ValueError(
                    "images: expected images that were projected in training mode, since attention dropout "
                    "is on, got some that were projected without"
                )
        if torch.is_grad_enabled() and any(t.requires_grad for t in images.cut_from):
            raise ValueError(
                "images: expected images that were projected with gradients, since weights or features they "
                "were made of require one, got some that were projected under torch.no_grad()"
            )
