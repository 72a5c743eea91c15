"""The run-time checker that jaxtyping uses in the tests: beartype, where an int is a float, as PEP 484 has it."""

from beartype import BeartypeConf, beartype

__all__ = ["checked"]

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
