"""What a role says of its arguments before its turn to be built comes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayrlhf.cluster.spec import load_class

__all__ = ["check_role"]


def check_role(build: str, kwargs: Mapping[str, Any]) -> None:
    """Import a role's class and let it check its arguments, in the process that will build it.

    Roles that share GPUs are built one after the other, which can take minutes. A class may have a class method
    ``check(**kwargs)``, which takes what its constructor takes besides ``world`` and raises, within seconds, what that would
    raise. It touches no GPU: another role is being built there.

    Raises:
        ImportError: where the module can't be imported or has no such class.
    """
    check = getattr(load_class(build), "check", None)
    if check is not None:
        check(**kwargs)
