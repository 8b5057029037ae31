import warnings

with warnings.catch_warnings():
    # flwr pins a typer that still uses names which click deprecates; nobody here can act on it, so it is imported once
    # with these warnings held back, before any test turns warnings into errors.
    warnings.filterwarnings("ignore", message="'click", category=DeprecationWarning)
    import flwr.app  # noqa: F401
