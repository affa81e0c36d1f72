"""Learning a world from a real environment: collect, train codec, flow, denoiser and heads, evaluate."""
