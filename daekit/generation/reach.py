"""Whether an endpoint can be asked at all, found out for one call that costs nothing."""

from __future__ import annotations

from daekit.generation.caller import run
from daekit.generation.endpoint import Endpoint
from daekit.generation.keys import Permissions, required_key
from daekit.recipe.judge import JudgeSpec


def require_answering(where: str, spec: JudgeSpec, allowed: Permissions) -> None:
    """Look for the key of an endpoint, then ask it once which models it has.

    Args:
        where: Begins an error (``judge``, ``models.far``).

    Raises:
        UserError: a key that is missing, or may not be sent there; nobody listens there; the key is refused.
    """
    assert spec.base_url is not None
    run(_look(Endpoint(f"{where} {spec.name}", spec, required_key(where, spec.base_url, spec.api_key_env, allowed))))


async def _look(endpoint: Endpoint) -> None:
    try:
        await endpoint.look()
    finally:
        await endpoint.close()
