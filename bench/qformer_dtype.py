"""How far a Q-Former is from the truth in each dtype: what `fuse(model, qformer_dtype=...)` costs.

    python bench/qformer_dtype.py

A full-size Q-Former with BERT's initial weights reads fp16 image features of 257 tokens. Printed is the norm
of what is wrong with its queries' last hidden states, as a share of their own; the truth is that of fp64.
"""

import argparse

import torch
from transformers import Blip2QFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

from blip2_kernels import fuse, unfuse


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = Blip2QFormerConfig(num_hidden_layers=arguments.layers)
    model = Blip2QFormerModel(config).eval()
    queries = torch.randn(1, 32, config.hidden_size) * config.initializer_range
    features = torch.randn(arguments.batch, 257, config.encoder_hidden_size).half()

    def hidden(dtype: torch.dtype) -> torch.Tensor:
        given = {"query_embeds": queries.expand(arguments.batch, -1, -1), "encoder_hidden_states": features}
        output = model(**{name: value.to(dtype) for name, value in given.items()})
        return output.last_hidden_state.double()

    fp32 = {name: value.clone() for name, value in model.state_dict().items()}
    model.double()
    truth = hidden(torch.float64)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model.to(torch.float32).load_state_dict(fp32)
        found = []
        for change in (unfuse, fuse):
            change(model).to(dtype)
            found.append(float((hidden(dtype) - truth).norm() / truth.norm()))
        print(f"{str(dtype).removeprefix('torch.')}: plain {found[0]:.1e}, fused {found[1]:.1e}")


if __name__ == "__main__":
    main()
