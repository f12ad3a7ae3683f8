"""Operations of the sampler, each defined in plain torch by `reference`."""
