"""The run-time type checker of the tests."""

import typing

from beartype import BeartypeConf, FrozenDict, beartype


CONF = BeartypeConf(
    hint_overrides=FrozenDict({typing.Self: typing.Any}),  # only known in decorated classes
    is_pep484_tower=True,  # an int is a float, as for every static checker
)
check = beartype(conf=CONF)
