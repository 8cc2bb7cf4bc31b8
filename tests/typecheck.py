"""The run-time type checker of the tests: beartype, but for `Self`, which it only knows in classes."""

import typing

from beartype import BeartypeConf, FrozenDict, beartype


CONF = BeartypeConf(
    hint_overrides=FrozenDict({typing.Self: typing.Any}),
    is_pep484_tower=True,  # an int is a float, as for every static checker
)
check = beartype(conf=CONF)
