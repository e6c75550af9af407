"""Context parallelism: a row's tokens divided among ranks."""
