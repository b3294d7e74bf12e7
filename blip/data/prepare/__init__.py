"""From records to samples and batches, one file a kind of sample."""
