import tests.triton_interpreter  # noqa: F401
