"""Llama-like models with fewer and larger operations than their Hugging Face modules.

Queries, keys and values come from one product, gate and up from another; the sum with the residual
and its norm are one operation, and so are the rotation and the write to the cache. The parameters
stay those of the module: theirs become views of the joined ones, so new weights in place reach
both.

Shape legend: T rows, E hidden size, V vocabulary, R rows of logits, P positions.
"""

from types import ModuleType

import torch
from restem_kernels.work import Work
from torch import Tensor, nn

from restem_lightning.sampler.kv_cache import KVCache

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # rotations that do not depend on the length


def can_fuse(module: nn.Module) -> bool:
    """Returns whether FusedModel computes what this causal language model does."""
    config = module.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    return config.model_type in MODEL_TYPES and rope in ROPE_TYPES and config.hidden_act == "silu"


class Projection:
    """Linear layers of one input as one product; their weights become views of the joined one."""

    def __init__(self, *linears: nn.Linear):
        """Joins the layers.

        Args:
            linears: of the same input; a single one keeps its weight.
        """
        self.weight, self.bias = linears[0].weight, linears[0].bias
        self.packed: Tensor | None = None
        if len(linears) > 1:
            sizes = [linear.out_features for linear in linears]
            self.weight = _join([linear.weight for linear in linears], sizes)
            if self.bias is not None:
                self.bias = _join([linear.bias for linear in linears], sizes)

    def pack(self) -> None:
        """Prepares the weight for the products of the CPU; needed again after it has changed.

        Otherwise torch makes that layout anew in every call. In this layout a row's result is also
        the same bits for any number of rows from 2 on (measured, torch 2.13).

        Source: torch's inductor, which does the same with frozen weights.
        """
        weight = self.weight.detach()
        if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
            return
        if weight.dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def __call__(self, x: Tensor) -> Tensor:
        """Returns [T, out] for x [T, in]."""
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return nn.functional.linear(x, self.weight, self.bias)


def _join(parameters: list[nn.Parameter], sizes: list[int]) -> Tensor:
    joined = torch.cat([parameter.detach() for parameter in parameters])
    for parameter, part in zip(parameters, joined.split(sizes), strict=True):
        parameter.data = part
    return joined


class _Layer:
    """One decoder layer."""

    def __init__(self, layer: nn.Module, config):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = Projection(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = Projection(attention.o_proj)
        self.gate_up = Projection(mlp.gate_proj, mlp.up_proj)
        self.down = Projection(mlp.down_proj)
        self.scaling = attention.scaling
        self.window = getattr(attention, "sliding_window", None)
        if config.model_type == "mistral":
            self.window = config.sliding_window
        self.head_norms = {}
        if hasattr(attention, "q_norm"):
            self.head_norms = {
                "q_norm": attention.q_norm.weight,
                "k_norm": attention.k_norm.weight,
                "eps": attention.q_norm.variance_epsilon,
            }
        self.projections = (self.qkv, self.out, self.gate_up, self.down)


class FusedModel:
    """Computes the logits of a causal language model that `can_fuse` allows."""

    def __init__(self, module: nn.Module, ops: ModuleType, cache: KVCache, *, num_positions: int):
        """Joins the weights.

        Args:
            module: in eval mode; its weights are used in place.
            ops: `restem_kernels.cpu`, `cpu_compiled` or `gpu`.
            cache: keys and values.
            num_positions: positions that can occur.
        """
        self.ops, self.cache = ops, cache
        model = module.model
        self.embedding, self.norm = model.embed_tokens, model.norm
        self.layers = [_Layer(layer, module.config) for layer in model.layers]
        self.head = Projection(module.lm_head)
        self.projections = [p for layer in self.layers for p in layer.projections] + [self.head]
        like = self.embedding.weight[:0]
        positions = torch.arange(num_positions, device=like.device)[None]
        with torch.no_grad():
            cos, sin = model.rotary_emb(like, positions)
        self.rotation = cos[0].contiguous(), sin[0].contiguous()
        self.pack()

    def pack(self) -> None:
        """Prepares the weights for the products; needed again after they have changed."""
        for projection in self.projections:
            projection.pack()

    def __call__(self, token_ids: Tensor, work: Work, logit_rows: Tensor | None) -> Tensor:
        """Returns logits [R, V]; writes keys and values to the cache.

        Args:
            token_ids: [T] int64.
            work: of the T rows.
            logit_rows: [R] int64, None for all rows.
        """
        ops, ready = self.ops, self.ops.prepare(work, self.cache.keys[0])
        hidden, total = self.embedding(token_ids), None
        caches = zip(self.cache.keys, self.cache.values, strict=True)
        for layer, cache in zip(self.layers, caches, strict=True):
            before, after = layer.norms
            normed, total = ops.add_rms_norm(
                hidden, before.weight, eps=before.variance_epsilon, residual=total
            )
            queries = ops.rotate_and_write(
                layer.qkv(normed), *self.rotation, *cache, ready, **layer.head_norms
            )
            mixed = ops.block_attention(
                queries, *cache, ready, scaling=layer.scaling, window=layer.window
            )
            normed, total = ops.add_rms_norm(
                layer.out(mixed.flatten(1)), after.weight, eps=after.variance_epsilon,
                residual=total,
            )  # fmt: skip
            hidden = layer.down(ops.gated_silu(layer.gate_up(normed)))
        normed, _ = ops.add_rms_norm(
            hidden, self.norm.weight, eps=self.norm.variance_epsilon, residual=total
        )
        return self.head(normed if logit_rows is None else normed[logit_rows])
