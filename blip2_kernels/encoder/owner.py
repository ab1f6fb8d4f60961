"""What a Q-Former needs to run itself through a fused encoder."""

from typing import Any

from torch import Tensor, nn

from .encoder import FusedEncoder
from .layer import LayerCall


class OwnsFusedEncoder:
    """Mixed into a Q-Former's class, in front of `nn.Module`."""

    @property
    def fused_encoder(self) -> FusedEncoder:
        """The `FusedEncoder` that reads this module's parameters, made on first use: its plan can be asked
        and forced, and `prepare_inference()` called."""
        if "_fused_encoder" not in self.__dict__:
            # Past nn.Module.__setattr__: the encoder refers back to this module and must not become its
            # child.
            encoder = FusedEncoder(self, self.call_layer, self.attention_backend)
            self.__dict__["_fused_encoder"] = encoder
        return self.__dict__["_fused_encoder"]

    @property
    def attention_backend(self) -> str:
        """What `FusedEncoder` is given as its `backend`; copies keep it."""
        return self.__dict__.get("_attention_backend", "auto")

    @attention_backend.setter
    def attention_backend(self, backend: str) -> None:
        self.__dict__["_attention_backend"] = backend
        if "_fused_encoder" in self.__dict__:
            self.__dict__["_fused_encoder"].backend = backend

    def __getstate__(self) -> dict[str, Any]:
        """Without the encoder, which belongs to this module and not to its copies."""
        return {name: value for name, value in self.__dict__.items() if name != "_fused_encoder"}

    @staticmethod
    def call_layer(layer: nn.Module, call: LayerCall) -> Tensor:
        """Call one of the Q-Former's layers as the module it is."""
        raise NotImplementedError
