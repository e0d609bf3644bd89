import inspect

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards import faults

FAULTS = [
    kind for _, kind in inspect.getmembers(faults, inspect.isclass) if kind.__module__ == faults.__name__
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_is_wrong_with_data_is_the_users_to_mend_and_each_fault_its_own(fault: type[Exception]) -> None:
    """A ConfigError ends a command with its message and exit code 2."""
    assert issubclass(fault, ConfigError)
    assert not any(issubclass(fault, other) for other in FAULTS if other is not fault)
    assert fault.__doc__
