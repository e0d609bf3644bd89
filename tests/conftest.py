"""Settings of all tests."""

from hypothesis import settings

# no deadline: cores are shared. Derandomized: the same examples in every run, so a red test stays red
settings.register_profile("motley", deadline=None, derandomize=True)
settings.load_profile("motley")
