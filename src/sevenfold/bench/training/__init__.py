"""Training steps against transformers, the hardware's floor and a softmax twin."""
