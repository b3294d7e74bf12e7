"""What a job keeps on disk or in an object store."""
