"""Where the tokens of a padded batch go: to the front, behind a prompt, or split into prefix and answer."""

import torch
from torch import Tensor

from blip2_kernels.checks import check_tensor, values_are_free

from .qformer_text import TOKEN_IDS

__all__ = ["front_order", "labels_behind_prompt", "move_padding_to_front", "split_prefix", "texts_as_given"]


def front_order(attention_mask: Tensor) -> Tensor:
    """Which token belongs where when a row's real tokens go first, in order, and its padding behind them.

    Args:
        attention_mask: 0/1 [B, T].

    Returns:
        int64 [B, T] for `gather(1, ...)`.
    """
    return (attention_mask == 0).to(torch.uint8).argsort(dim=1, stable=True)


def texts_as_given(rows: Tensor, order: Tensor) -> Tensor:
    """Bring texts that were put in another order back to where the caller had them.

    Args:
        rows: [B, Q + T, V], soft prompt first, then the text in its new order.
        order: int64 [B, T] of `front_order`.

    Returns:
        [B, Q + T, V], the soft prompt as it was.
    """
    if bool((order[:, 1:] > order[:, :-1]).all()):
        return rows
    num_queries = rows.shape[1] - order.shape[1]
    back = order.argsort(dim=1)[..., None].expand(-1, -1, rows.shape[-1]).to(rows.device)
    return torch.cat([rows[:, :num_queries], rows[:, num_queries:].gather(1, back)], dim=1)


def move_padding_to_front(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Move the padding behind each row of a decoder's inputs in front of it, so that all rows end together.

    Args:
        inputs: `inputs_embeds` [B, L, D] and 0/1 `attention_mask` [B, L], real rows first.

    Returns:
        The same, real rows last.
    """
    embeds, mask = inputs["inputs_embeds"], inputs["attention_mask"]
    length = mask.shape[1]
    padding = length - mask.sum(dim=1, keepdim=True)  # [B, 1]
    order = (torch.arange(length, device=mask.device) - padding) % length  # [B, L]
    return {
        "inputs_embeds": embeds.gather(1, order[..., None].expand_as(embeds)),
        "attention_mask": mask.gather(1, order),
    }


def labels_behind_prompt(input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Labels [B, T] of texts whose first `prompt_lengths` real tokens, like the padding, are not supervised.

    Raises:
        TypeError, ValueError: as `split_prefix`.
    """
    _check_prompt_lengths(prompt_lengths, attention_mask)
    ordinal = attention_mask.cumsum(dim=1) - 1
    supervised = (attention_mask != 0) & (ordinal >= prompt_lengths[:, None].to(ordinal.device))
    return input_ids.masked_fill(~supervised, -100)


def split_prefix(
    input_ids: Tensor, attention_mask: Tensor, prompt_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Split texts into what an encoder reads and what its decoder is to say (prefix-LM, paper figure 3).

    Args:
        input_ids: integers [B, T].
        attention_mask: 0/1 [B, T].
        prompt_lengths: integers [B], in [0, real tokens of the row].

    Returns:
        (input_ids [B, P], attention_mask [B, P], labels [B, A]): the prefixes and the rest, each padded on
        the right (labels with -100) to its longest row.

    Raises:
        TypeError: prompt_lengths is no integer tensor.
        ValueError: of another shape, or out of range.
    """
    _check_prompt_lengths(prompt_lengths, attention_mask)
    order = front_order(attention_mask)
    ids, real = input_ids.gather(1, order), attention_mask.gather(1, order) != 0
    prompt_lengths = prompt_lengths.to(ids.device)[:, None].long()
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    prefix = place < prompt_lengths
    # The rest of each row, rolled to the front.
    source = (place + prompt_lengths) % max(1, ids.shape[1])
    supervised = (place + prompt_lengths < ids.shape[1]) & real.gather(1, source)
    labels = ids.gather(1, source).masked_fill(~supervised, -100)
    prefix_length = int(prefix.sum(dim=1).max())
    answer_length = int(supervised.sum(dim=1).max())
    return (
        ids[:, :prefix_length],
        prefix[:, :prefix_length].to(attention_mask.dtype),
        labels[:, :answer_length],
    )


def _check_prompt_lengths(prompt_lengths: Tensor, attention_mask: Tensor) -> None:
    check_tensor("prompt_lengths", prompt_lengths, [attention_mask.shape[0]], TOKEN_IDS)
    if values_are_free(prompt_lengths.device):
        lengths = (attention_mask != 0).sum(dim=1).cpu()
        wrong = ((prompt_lengths < 0) | (prompt_lengths > lengths)).nonzero()[:, 0]
        if wrong.numel():
            row = int(wrong[0])
            raise ValueError(
                f"prompt_lengths: expected a value in [0, {int(lengths[row])}], the tokens of row {row}, "
                f"got {int(prompt_lengths[row])}"
            )
