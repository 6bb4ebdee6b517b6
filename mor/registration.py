"""Making peft know Mixture-of-Ranks adapters, when it is asked for: peft is optional, and slow to import."""


def register_with_peft() -> None:
    """Make peft read, write and build Mixture-of-Ranks adapters; the same as ``import mor.peft_plugin``.

    Once per process, before peft sees such an adapter; more often does no harm.

    Raises:
        ImportError: peft 0.18 or newer is not installed.
    """
    import mor.peft_plugin  # noqa: F401
