"""One Hypothesis profile for all: no deadlines (machines differ), the same examples everywhere."""

from hypothesis import settings

settings.register_profile("molere", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("molere")
