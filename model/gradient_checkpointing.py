"""Gradient checkpointing of a whole model under the names that transformers and its `Trainer` call."""

from typing import Any

from .qformer import QFormerModel


class CheckpointsQFormer:
    """Mixin of models with a `qformer`, whose layers are computed again in the backward where asked for.

    `TrainingArguments(gradient_checkpointing=True)` reaches it, and so do transformers' newer names with
    `activation_` for `gradient_`. Only the Q-Former is checkpointed: image encoder and language model are
    frozen and in eval mode, in which transformers checkpoints nothing.
    """

    qformer: QFormerModel
    supports_gradient_checkpointing = True

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the Q-Former's layers are computed again in the backward while the model trains."""
        return self.qformer.gradient_checkpointing

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the Q-Former's layers again in the backward, on both paths: less memory for more time.

        Args:
            gradient_checkpointing_kwargs: as transformers passes them; checkpointing here is never reentrant.
            every_n_layers, offload: of transformers 5.23 and newer; only their defaults are served.

        Raises:
            ValueError: `use_reentrant=True`, another `every_n_layers` than 1, or `offload=True`.
        """
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers: expected 1, every layer is checkpointed, got {every_n_layers}")
        if offload:
            raise ValueError("offload: expected False, checkpoints stay on their device, got True")
        self.qformer.gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the backward needs."""
        self.qformer.gradient_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing` by its newer name."""
        return self.is_gradient_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` by its newer name."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable` by its newer name."""
        self.gradient_checkpointing_disable()
