"""Validation sources: a fixed set of batches, or a buffer that the splitter fills from the stream."""

from torch_molere.validation.buffer import ValidationBuffer
from torch_molere.validation.fixed import FixedValidation
from torch_molere.validation.source import Drawn, Sending, ValidationSource, held_out
from torch_molere.validation.store import first_half

__all__ = ["Drawn", "FixedValidation", "Sending", "ValidationBuffer", "ValidationSource", "first_half", "held_out"]
