"""One step of many sequences: their records, the ragged batch, the model, the sampler. Knows nothing of gRPC or text."""
