"""Forward passes of a policy over the block cache, and the decode step as captured CUDA graphs.

Shape legend: T rows, V vocabulary, R rows of logits, B lanes.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from restem_kernels.work import Work
from torch import Tensor, nn

from restem_lightning.errors import UserError
from restem_lightning.sampler.attention import AttentionState
from restem_lightning.sampler.fused import FusedModel, Projection, can_fuse
from restem_lightning.sampler.kv_cache import KVCache


class PlainModel:
    """Computes logits with the Hugging Face module as it is, behind our attention."""

    def __init__(self, module: nn.Module, ops: ModuleType, cache: KVCache):
        """Takes the module.

        Args:
            module: a causal language model with our attention, in eval mode.
            ops: `restem_kernels.cpu`, `cpu_compiled` or `gpu`.
            cache: keys and values.
        """
        self.module, self.ops, self.cache = module, ops, cache
        self.num_layers = module.config.get_text_config().num_hidden_layers
        self.projections = []
        for linear in module.modules():
            if type(linear) is nn.Linear and linear.weight.device.type == "cpu":
                linear.forward = Projection(linear)
                self.projections.append(linear.forward)
        self.pack()

    def pack(self) -> None:
        """Prepares the weights for the products; needed again after they have changed."""
        for projection in self.projections:
            projection.pack()

    def __call__(self, token_ids: Tensor, work: Work, logit_rows: Tensor | None) -> Tensor:
        """Returns logits [R, V]; see `FusedModel.__call__`.

        Raises:
            UserError: if the module has layers that do not attend through our attention.
        """
        state = AttentionState(self.ops, work, self.cache)
        logits = self.module(
            input_ids=token_ids[None],
            position_ids=work.positions[None].long(),
            use_cache=False,
            logits_to_keep=0 if logit_rows is None else logit_rows,
            attention_state=state,
        ).logits[0]
        if state.num_calls != self.num_layers:
            raise UserError(
                f"the sampler does not support {self.module.config.model_type}: "
                f"{state.num_calls} of its {self.num_layers} layers use transformers' attention "
                "interface"
            )
        return logits


def make_cache(module: nn.Module, *, num_blocks: int, block_size: int) -> KVCache:
    """Returns an empty cache for a causal language model.

    Args:
        module: says how many layers and heads there are, on which device and of which dtype.
        num_blocks: blocks in the cache.
        block_size: tokens in a block.
    """
    config = module.config.get_text_config()
    weight = module.get_input_embeddings().weight
    head_size = getattr(config, "head_dim", None)
    return KVCache(
        num_layers=config.num_hidden_layers,
        num_blocks=num_blocks,
        num_key_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        block_size=block_size,
        head_size=head_size or config.hidden_size // config.num_attention_heads,
        device=weight.device,
        dtype=weight.dtype,
    )


def useful_tokens(module: nn.Module, num_bytes: int, *, num_lanes: int, context: int) -> int:
    """Returns how many tokens a cache of some bytes holds, or how many can ever be in use.

    Of a small model a GPU could hold a hundred million, and the host keeps lists of their blocks.

    Args:
        module: as for `make_cache`.
        num_bytes: of the cache at most.
        num_lanes: sequences decoded together.
        context: most tokens of a prompt and its completion.
    """
    probe = make_cache(module, num_blocks=1, block_size=1)
    per_token = 2 * len(probe.keys) * probe.keys[0].numel() * probe.keys[0].element_size()
    # What runs and the prompts that wait take twice the lanes; blocks need not be full.
    return min(num_bytes // per_token, 4 * num_lanes * context)


def make_model(
    module: nn.Module, ops: ModuleType, cache: KVCache, *, num_positions: int
) -> FusedModel | PlainModel:
    """Returns what computes the logits of a module: fused where that is known to be the same."""
    if can_fuse(module):
        return FusedModel(module, ops, cache, num_positions=num_positions)
    return PlainModel(module, ops, cache)


class StepGraphs:
    """Runs a step of n rows; on a GPU from a CUDA graph that is captured once for each n.

    The first step of n rows runs as it is: it compiles and sets up what a capture must not. A graph
    replays the same kernels on the same addresses: every length is read from device
    tensors, and new weights are written in place.
    """

    def __init__(self, step: Callable[[int], Tensor], device: torch.device):
        """Captures nothing yet.

        Args:
            step: of the first n rows; returns a tensor; never waits for the device.
            device: where it runs.
        """
        self.step, self.device = step, device
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.seen: set[int] = set()
        self.pool = None
        # Of its own: workspaces belong to a stream, and go when any graph captured on it goes.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.generation = 0

    def keep_for(self, generation: int) -> None:
        """Drops all graphs if a tensor that they use has been replaced since this generation."""
        if generation != self.generation:
            self.generation = generation
            if self.graphs:
                torch.cuda.synchronize(self.device)  # the last ones may still be running
            self.graphs.clear()
            self.seen.clear()
            self.pool = None  # a pool cannot be used again once its last graph is gone

    def __call__(self, num_rows: int) -> Tensor:
        """Returns what the step returns; on a GPU the next call of the same n overwrites it."""
        if self.device.type != "cuda" or num_rows not in self.seen:
            self.seen.add(num_rows)
            return self.step(num_rows)
        if num_rows not in self.graphs:
            self.graphs[num_rows] = self._capture(num_rows)
        graph, output = self.graphs[num_rows]
        graph.replay()
        return output

    def _capture(self, num_rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Returns a graph of the step and its output; capturing computes nothing."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads (of a loader, of NCCL) may go on using the device.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            output = self.step(num_rows)
        self.pool = graph.pool()
        return graph, output
