"""Files of a job, on disk or in an object store."""
