"""The loop: what joins sampler, verifiers and M-step."""
