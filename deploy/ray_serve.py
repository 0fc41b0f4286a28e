"""The server in Ray Serve's replicas: the same ASGI app, which Ray starts, watches, and starts again.

    pip install "ray[serve]"                     # beside tiny_llm
    cd deploy && serve run ray_serve:build model=demo least=2 most=4   # the replicas look for this file there

Without a key (TINY_LLM_API_KEY) only calls to localhost are answered. RAY_SERVE_ENABLE_HA_PROXY=1 has Ray put
HAProxy before the replicas, in place of its own proxy: on Linux alone, and it listens on all addresses.
"""

# Ray looks at the class in a signature: no `from __future__ import annotations`.
import os

from pydantic import BaseModel
from ray import serve
from starlette.types import ASGIApp

from tiny_llm.engine.async_llm import AsyncLLM
from tiny_llm.server.run import application
from tiny_llm.server.service import Service
from tiny_llm.server.settings import ServerSettings


class Options(BaseModel):
    """What ``serve run`` takes: which model, what its keys and values may take, how many replicas."""

    model: str = "demo"
    kv_memory_mb: int = 512
    least: int = 1
    most: int = 4
    cores: float = 1


@serve.deployment(health_check_period_s=2, graceful_shutdown_timeout_s=35, max_ongoing_requests=64)
@serve.ingress()
class Replica:
    """One engine. Its requests end within Ray's graceful_shutdown_timeout_s when it is to leave."""

    def __init__(self, options: Options) -> None:
        keys = tuple(filter(None, [os.environ.get("TINY_LLM_API_KEY", "")]))
        settings = ServerSettings(name=options.model, api_keys=keys)
        self.service = Service(
            settings, lambda: AsyncLLM(options.model, kv_memory=options.kv_memory_mb * 2**20)
        )

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called once, before the first request."""
        await self.service.start()
        return application(self.service, local_only=True)

    def check_health(self) -> None:
        """Raises where only a new replica helps."""
        if self.service.state == "dead":
            raise RuntimeError("the engine has stopped")


def build(options: Options) -> serve.Application:
    """An answer that runs is an ongoing request: above 8 of them a replica, Ray starts another one."""
    scaling = {"min_replicas": options.least, "max_replicas": options.most, "target_ongoing_requests": 8}
    sized = Replica.options(autoscaling_config=scaling, ray_actor_options={"num_cpus": options.cores})
    return sized.bind(options)
