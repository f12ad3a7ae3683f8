"""Fast batched sampling from a Hugging Face policy: token ids in, token ids out."""

from restem_lightning.sampler.engine import EngineParams, Sampler
from restem_lightning.sampler.params import Request, Sample, SamplingParams

__all__ = ["EngineParams", "Request", "Sample", "Sampler", "SamplingParams"]
