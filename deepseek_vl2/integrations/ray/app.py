"""The Ray Serve application: replicas of our server behind one address.

``serve run deepseek_vl2.integrations.ray.app:build model=nano`` starts it; deploy/ray has one for ``serve deploy``.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .ingress import Ingress
from .replica import ModelReplica, read_options

SHUTDOWN_SECONDS = 120.0


class AppOptions(BaseModel):
    """What ``build`` takes, from a command line or a config's ``args``.

    Fields:
        model: directory or hub id of a checkpoint, there on every node.
        options: others of ``deepseek-vl2 serve``, as on its command line.
        min_replicas, max_replicas: between which Ray Serve chooses.
        target_requests: that a replica should have in hand; more in the mean start another replica.
        max_requests: that a replica may have in hand; others wait at the address.
        max_waiting: requests that may wait there, for each of its processes; others are told to come again. -1: any.
        imbalance: see `routing.StickyRouter`.
        gpus, cpus: of a replica.
        ingresses: processes that take requests.
        upscale_seconds, downscale_seconds: how long there must be more, or less, to do.
        max_body_mib: size of a request's body.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "nano"
    options: list[str] = Field(default_factory=list)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=1, ge=1)
    target_requests: float = Field(default=32.0, gt=0)
    max_requests: int = Field(default=128, ge=1)
    max_waiting: int = Field(default=256, ge=-1)
    imbalance: int = Field(default=16, ge=0)
    gpus: float = Field(default=1.0, ge=0)
    cpus: float = Field(default=2.0, gt=0)
    ingresses: int = Field(default=1, ge=1)
    upscale_seconds: float = Field(default=10.0, ge=0)
    downscale_seconds: float = Field(default=600.0, ge=0)
    max_body_mib: int = Field(default=32, ge=1)


def app_options(args: dict[str, Any]) -> AppOptions:
    """Return the options of the application.

    Raises:
        ValueError: one is unknown or wrong.
    """
    given = dict(args)
    if isinstance(given.get("options"), str):
        given["options"] = given["options"].split()
    try:
        options = AppOptions(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if options.max_replicas < options.min_replicas:
        raise ValueError(f"max_replicas: {options.max_replicas} is less than min_replicas, {options.min_replicas}.")
    read_options(server_options(options))  # what is wrong is told here, not by replicas that start again and again
    return options


def server_options(options: AppOptions) -> list[str]:
    """Return the options of each replica's server."""
    return [options.model, "--max_body_mib", str(options.max_body_mib), *options.options]


def build(args: dict[str, Any]) -> Any:
    """Return the application, for ``serve run`` and ``serve deploy``; see `AppOptions`.

    Raises:
        ValueError: an option is unknown or wrong.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from .routing import StickyRouter

    options = app_options(args)
    replicas = serve.deployment(
        name="model",
        ray_actor_options={"num_gpus": options.gpus, "num_cpus": options.cpus},
        autoscaling_config={
            "min_replicas": options.min_replicas,
            "max_replicas": options.max_replicas,
            "target_ongoing_requests": options.target_requests,
            "upscale_delay_s": options.upscale_seconds,
            "downscale_delay_s": options.downscale_seconds,
        },
        max_ongoing_requests=options.max_requests,
        max_queued_requests=options.max_waiting,
        request_router_config=RequestRouterConfig(
            request_router_class=StickyRouter, request_router_kwargs={"imbalance": options.imbalance}
        ),
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
        health_check_period_s=10,
        health_check_timeout_s=30,
    )(ModelReplica)
    ingress = serve.deployment(
        name="ingress",
        num_replicas=options.ingresses,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=options.max_replicas * options.max_requests + max(0, options.max_waiting),
        graceful_shutdown_timeout_s=SHUTDOWN_SECONDS,
    )(Ingress)
    return ingress.bind(replicas.bind(server_options(options)), options.max_body_mib << 20)
