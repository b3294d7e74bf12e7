"""From records to samples and batches, one file per kind of sample."""
