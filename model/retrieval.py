"""Image-text retrieval with a stage-1 model: contrastive scores, matching scores and two-step re-ranking.

The contrastive score (ITC) of image and text is the cosine of the text feature with the image's best query;
it needs each image and text once. The matching score (ITM) reads image and text together and needs every
pair, so LAVIS scores only the best pairs of the first (paper section 4.3). Everything here runs in chunks, in
eval mode, without gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip2_kernels.checks import (
    INTEGERS,
    check_binary,
    check_function,
    check_int,
    check_range,
    check_tensor,
    describe,
)
from blip2_kernels.layout import MASK_DTYPES

from .base import Blip2Base, PreparedImages, evaluation_mode

Progress = Callable[[int, int], None]
NOT_SCORED = -100.0
"""What LAVIS writes where a pair was not among the best by ITC: below every score, so that ranking is
unharmed."""


@dataclass(frozen=True)
class RerankOutput:
    """Scores of N images and M texts, all fp32 and the higher the better.

    Attributes:
        itc: [N, M], cosine similarities.
        image_to_text: [N, M], ITM plus ITC of each image's best k texts, -100 elsewhere: rank texts along a
            row.
        text_to_image: [M, N], the same for each text's best k images.
    """

    itc: Tensor
    image_to_text: Tensor
    text_to_image: Tensor


class Blip2ForImageTextRetrieval(Blip2Base):
    """Scores images against texts; parameters are those of `Blip2Base`.

    Features come from `get_image_features`, `get_text_features` and `get_multimodal_features` (LAVIS's
    `extract_features` in its three modes).

    Args:
        config: stage-1 configuration.
        vision_model: frozen image encoder, or None where callers pass `image_features`.
        use_fused: run through the fused encoder: an image is projected once however many texts it meets.

    Raises:
        TypeError: a configuration or image encoder of another kind.
    """

    @classmethod
    def from_pretraining(cls, model: Blip2Base) -> "Blip2ForImageTextRetrieval":
        """A retrieval model that shares the parameters and the image encoder of a stage-1 model."""
        if not isinstance(model, Blip2Base):
            raise TypeError(f"model: expected a Blip2ForPreTraining, got {describe(model)}")
        with torch.device("meta"):
            retrieval = cls(model.config, use_fused=model.use_fused)
        retrieval.query_tokens = model.query_tokens
        for name, _ in list(retrieval.named_children()):
            setattr(retrieval, name, getattr(model, name))
        retrieval.vision_model = model.vision_model
        retrieval.training = model.training
        return retrieval

    @torch.no_grad()
    def itc_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Contrastive scores of N images and M texts.

        Args:
            input_ids: integers [M, T], texts that start with [CLS].
            attention_mask: 0/1 [M, T]; default all 1.
            image_features: [N, tokens, width], the frozen encoder's output before `ln_vision`; or
            pixel_values: [N, ...], what the image encoder takes.
            image_mask: 0/1 [N, tokens]; default all.
            batch_size: images or texts run at a time.
            progress: called as progress(done, total) behind each chunk, in images and texts.

        Returns:
            fp32 [N, M], cosines in [-1, 1], not divided by the temperature.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value.
        """
        check_int("batch_size", batch_size, 1)
        check_function("progress", progress)
        attention_mask = self.check_text(input_ids, attention_mask)
        images = self._image_chunks(image_features, pixel_values, image_mask)
        with evaluation_mode(self):
            return self._contrast(images, input_ids, attention_mask, batch_size, progress)

    def _contrast(
        self,
        images: "_Images",
        input_ids: Tensor,
        attention_mask: Tensor,
        batch_size: int,
        progress: Progress | None = None,
    ) -> Tensor:
        """`itc_scores` of checked arguments, in eval mode."""
        total, done = len(images) + len(input_ids), 0
        texts = []
        for ids, mask in zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True):
            texts.append(self.get_text_features(ids, mask).float())
            done = _report(progress, done + len(ids), total)
        text_feats = torch.cat(texts)
        scores = text_feats.new_empty(len(images), len(input_ids))
        for start in range(0, len(images), batch_size):
            prepared = images.prepare(start, start + batch_size)
            image_feats = self.project_image(self.image_hidden(prepared)).float()
            # A query at a time, so that no [chunk, Q, M] tensor ever exists.
            best = scores[start : start + batch_size].fill_(-torch.inf)
            with _full_precision(best):
                for query in image_feats.unbind(1):
                    torch.maximum(best, query @ text_feats.T, out=best)
            done = _report(progress, done + len(image_feats), total)
        return scores

    def itm_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Matching logits (no match, match) of every pair of N images and M texts, fp32 [N, M, 2].

        Arguments and errors as `itc_scores`; `batch_size` counts pairs, and images whose features are held,
        at a time.
        """
        images = self._image_chunks(image_features, pixel_values, image_mask)
        attention_mask = self.check_text(input_ids, attention_mask)
        texts = len(input_ids)
        pairs = torch.arange(len(images) * texts, device=input_ids.device)
        logits = self._logits_by_image(
            images, input_ids, attention_mask, pairs // texts, pairs % texts, batch_size, progress
        )
        return logits.unflatten(0, (len(images), texts))

    def pair_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Matching logits (no match, match) of each of M texts with one of N images, fp32 [M, 2].

        An image is prepared once, however many texts it meets and in whatever order they come.

        Args:
            image_index: integers [M] in [0, N), the image of each text; default image s for text s.

        Other arguments and errors as `itm_logits`.
        """
        images = self._image_chunks(image_features, pixel_values, image_mask)
        attention_mask = self.check_text(input_ids, attention_mask)
        texts = len(input_ids)
        if image_index is None:
            if len(images) != texts:
                raise ValueError(
                    f"image_index: expected one for {len(images)} images and {texts} texts, got None"
                )
            image_index = torch.arange(texts, device=input_ids.device)
        check_tensor("image_index", image_index, [texts], INTEGERS, input_ids.device)
        check_range("image_index", image_index, len(images), force=True)
        image_of, text_of = image_index.long().sort(stable=True)
        logits = self._logits_by_image(
            images, input_ids, attention_mask, image_of, text_of, batch_size, progress
        )
        return logits[text_of.argsort()]

    def itm_scores(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> Tensor:
        """Matching scores of every pair, fp32 [N, M]: the logit of "match", as LAVIS ranks by.

        Arguments and errors as `itm_logits`; its softmax over the last dimension gives probabilities.
        """
        logits = self.itm_logits(
            input_ids,
            attention_mask,
            image_features,
            pixel_values,
            image_mask,
            batch_size=batch_size,
            progress=progress,
        )
        return logits[..., 1]

    @torch.no_grad()
    def rerank(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_features: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_mask: Tensor | None = None,
        *,
        k: int = 128,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> RerankOutput:
        """Score all pairs by ITC, then each image's best k texts and each text's best k images by ITM + ITC.

        A pair that is among the best both ways is read once, and so is every text for ITC. Up to `batch_size`
        images are prepared once for both steps. More are prepared once a step, since keys and values of all
        would have to be held between the two; in fp32 on a CPU the first step needs none, as it takes the
        absorbed form.

        Args:
            k: candidates a query (of texts or images); all where there are fewer.
            input_ids, attention_mask, image_features, pixel_values, image_mask: as `itc_scores`.
            batch_size: as `itm_logits`.
            progress: called for the ITM part, in pairs.

        Returns:
            `RerankOutput`.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, shape or value.
        """
        check_int("k", k, 1)
        check_int("batch_size", batch_size, 1)
        check_function("progress", progress)
        attention_mask = self.check_text(input_ids, attention_mask)
        images = self._image_chunks(image_features, pixel_values, image_mask)
        if not images.encoded:
            # Both steps look at every image: encode once.
            starts = range(0, len(images), batch_size)
            image_features = torch.cat([images.features(s, s + batch_size) for s in starts])
            images = self._image_chunks(image_features, None, image_mask)
        with evaluation_mode(self):
            if len(images) <= batch_size:
                # An image is read once for ITC and at least by its own best texts.
                images = images.kept(len(images) * (1 + min(k, len(input_ids))))
            itc = self._contrast(images, input_ids, attention_mask, batch_size)
        best_texts = torch.zeros_like(itc, dtype=torch.bool)
        best_texts.scatter_(1, itc.topk(min(k, itc.shape[1]), dim=1).indices, True)
        best_images = torch.zeros_like(best_texts)
        best_images.scatter_(0, itc.topk(min(k, itc.shape[0]), dim=0).indices, True)
        image_of, text_of = (best_texts | best_images).nonzero(as_tuple=True)
        logits = self._logits_by_image(
            images, input_ids, attention_mask, image_of, text_of, batch_size, progress
        )
        scores = torch.full_like(itc, NOT_SCORED)
        scores[image_of, text_of] = logits[:, 1] + itc[image_of, text_of]
        return RerankOutput(
            itc=itc,
            image_to_text=scores.masked_fill(~best_texts, NOT_SCORED),
            text_to_image=scores.masked_fill(~best_images, NOT_SCORED).T.contiguous(),
        )

    @torch.no_grad()
    def _logits_by_image(
        self,
        images: "_Images",
        input_ids: Tensor,
        attention_mask: Tensor,
        image_of: Tensor,
        text_of: Tensor,
        batch_size: int,
        progress: Progress | None,
    ) -> Tensor:
        """ITM logits [P, 2] of P pairs, sorted by image; at most `batch_size` images are prepared at a
        time."""
        check_int("batch_size", batch_size, 1)
        check_function("progress", progress)
        logits = torch.empty(len(image_of), 2, device=input_ids.device)
        starts = torch.arange(0, len(images) + batch_size, batch_size, device=image_of.device)
        bounds = torch.searchsorted(image_of, starts).tolist()
        with evaluation_mode(self):
            for start, first, last in zip(starts.tolist(), bounds, bounds[1:], strict=False):
                if first == last:
                    continue
                prepared = images.prepare(start, start + batch_size, last - first)
                for begin in range(first, last, batch_size):
                    pairs = slice(begin, min(begin + batch_size, last))
                    hidden = self.multimodal_hidden(
                        prepared,
                        input_ids[text_of[pairs]],
                        attention_mask[text_of[pairs]],
                        image_index=image_of[pairs] - start,
                    )
                    with _full_precision(hidden):
                        logits[pairs] = self.match(hidden.to(self.itm_head.weight.dtype)).float()
                    _report(progress, pairs.stop, len(image_of))
        return logits

    def _image_chunks(
        self, image_features: Tensor | None, pixel_values: Tensor | None, image_mask: Tensor | None
    ) -> "_Images":
        """Check a set of images without encoding it."""
        if pixel_values is not None and image_features is None:
            if not isinstance(pixel_values, Tensor) or pixel_values.dim() == 0 or len(pixel_values) == 0:
                raise TypeError(f"pixel_values: expected a tensor of images, got {describe(pixel_values)}")
            source = pixel_values
        else:
            source = self.frozen_features(image_features, pixel_values)
        if image_mask is not None:
            check_tensor("image_mask", image_mask, [len(source), "tokens"], MASK_DTYPES)
            check_binary("image_mask", image_mask)
        return _Images(self, source, image_mask, encoded=source is image_features)


@dataclass(frozen=True)
class _Images:
    """A set of images, encoded already or as pixels, handed out in chunks."""

    model: Blip2Base
    source: Tensor
    mask: Tensor | None
    encoded: bool
    prepared: PreparedImages | None = None

    def __len__(self) -> int:
        return len(self.source)

    def features(self, start: int, stop: int) -> Tensor:
        chunk = self.source[start:stop]
        return chunk if self.encoded else self.model.frozen_features(pixel_values=chunk)

    def prepare(self, start: int, stop: int, samples: int | None = None) -> PreparedImages:
        """A slice, ready for `samples` samples to look at; default each image for one."""
        if self.prepared is not None:
            return self.prepared
        features = self.features(start, stop)
        mask = None if self.mask is None else self.mask[start:stop]
        samples = len(features) if samples is None else samples
        return self.model.prepare_images(features, None, mask, samples=samples)

    def kept(self, samples: int) -> "_Images":
        """The same, prepared as a whole, once."""
        return replace(self, prepared=self.prepare(0, len(self), samples))


def _full_precision(beside: Tensor) -> torch.autocast:
    """No autocast on a tensor's device: scores in half precision would tie, and ties count as wrong."""
    return torch.autocast(beside.device.type, enabled=False)


def _report(progress: Progress | None, done: int, total: int) -> int:
    if progress is not None:
        progress(done, total)
    return done
