"""The `sevenfold` program: the place where the packages are put together."""
