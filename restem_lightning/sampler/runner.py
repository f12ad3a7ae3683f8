"""One forward pass of the Hugging Face module over the block cache."""

import torch
from torch import Tensor, nn

from restem_lightning.errors import UserError
from restem_lightning.sampler.attention import AttentionState
from restem_lightning.sampler.batch import Batch
from restem_lightning.sampler.kv_cache import KVCache


class Runner:
    """Holds the module and its cache, and turns a batch into logits."""

    def __init__(self, module: nn.Module, *, num_blocks: int, block_size: int):
        """Allocates the cache for a module.

        Args:
            module: a causal language model behind our attention, in eval mode.
            num_blocks: blocks in the cache.
            block_size: tokens in a block.
        """
        self.module = module
        config = module.config.get_text_config()
        weight = module.get_input_embeddings().weight
        head_size = getattr(config, "head_dim", None)
        self.cache = KVCache(
            num_layers=config.num_hidden_layers,
            num_blocks=num_blocks,
            num_key_heads=getattr(config, "num_key_value_heads", config.num_attention_heads),
            block_size=block_size,
            head_size=head_size or config.hidden_size // config.num_attention_heads,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.num_layers = config.num_hidden_layers
        self.device = weight.device

    @torch.inference_mode()
    def forward(self, batch: Batch, *, pad_to: int) -> Tensor:
        """Returns the logits [R, V] of the batch's R logit rows.

        Args:
            batch: the rows to compute.
            pad_to: rows of the product with the output embedding at least; see `build_batch`.

        Raises:
            UserError: if the module has layers that do not attend through our attention.
        """
        wanted = len(batch.logit_rows)
        rows = batch.logit_rows + [0] * (max(wanted, pad_to) - wanted if wanted else 0)
        state = AttentionState(batch, self.cache)
        # One row at least: an empty index would make a product with no rows.
        keep = torch.tensor(rows or [0], dtype=torch.int64, device=self.device)
        logits = self.module(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=keep,
            attention_state=state,
        ).logits[0]
        if state.num_calls != self.num_layers:
            raise UserError(
                f"the sampler does not support {self.module.config.model_type}: "
                f"{state.num_calls} of its {self.num_layers} layers use transformers' attention "
                "interface"
            )
        return logits[:wanted]
