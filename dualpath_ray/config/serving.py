"""The HTTP service and the limits of its API."""

from __future__ import annotations

from typing import Self

from pydantic import ByteSize, Field, model_validator

from dualpath_ray.config.section import Count, Delay, Seconds, Section, UserPath


class ServingSettings(Section):
    """The `serving` section."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on; 0.0.0.0 for all. Use api_keys and TLS beyond one machine."
    )
    port: int = Field(default=8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_keys: UserPath | None = Field(default=None, description="File of API keys (`dualpath keys create`); without one anybody may call.")
    tls_certificate: UserPath | None = Field(default=None, description="PEM file with the server's certificate chain: serve HTTPS.")
    tls_key: UserPath | None = Field(default=None, description="PEM file with the certificate's private key.")
    replicas: Count = Field(default=1, description="HTTP replicas; each tokenises, asks the scheduler and streams.")
    most_replicas: Count | None = Field(
        default=None,
        description="With this, Ray Serve runs `replicas` to this many, so that 0.6 x `max_concurrent_requests` are in progress in each.",
    )
    more_replicas_after_s: Delay = Field(default=30.0, description="How long there must be too few replicas before Ray Serve adds some.")
    fewer_replicas_after_s: Delay = Field(default=600.0, description="How long there must be too many before it stops some.")
    request_timeout_s: Seconds = Field(default=600.0, description="A request that takes longer is given up and its resources are freed.")
    max_concurrent_requests: Count = Field(default=256, description="Requests that one replica serves at once.")
    max_queued_requests: Count = Field(default=1024, description="Requests that may wait for a replica; more get status 429.")
    stream_interval_s: float = Field(
        default=0.01,
        ge=0,
        le=10,
        description="The least time between two events of a stream: tokens that come faster share one. 0: each by itself.",
    )
    default_max_tokens: Count = Field(default=512, description="Completion tokens when the request does not say (never past the context).")
    max_tokens_limit: Count | None = Field(default=None, description="Completion tokens that a request may ask for; default: the context.")
    max_choices: Count = Field(default=16, description="Answers to one request: prompts times n. Each counts as a request.")
    max_stop_strings: Count = Field(default=16, description="Stop strings in one request.")
    max_body_bytes: ByteSize = Field(default=ByteSize(32 << 20), gt=0, description="Size of a request's body.")

    files: UserPath | None = Field(
        default=None,
        description="Directory, shared by all nodes that run replicas, for /v1/files and /v1/batches; without it they are off.",
    )
    max_file_bytes: ByteSize = Field(default=ByteSize(512 << 20), gt=0, description="Size of an uploaded file.")
    batch_concurrency: Count = Field(default=64, description="Requests of /v1/batches in progress at once.")
    body_timeout_s: Seconds = Field(default=60.0, description="A client that takes longer to send its body gets status 408.")

    @model_validator(mode="after")
    def _certificate_with_key(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together")
        return self

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> Self:
        if self.most_replicas is not None and self.most_replicas < self.replicas:
            raise ValueError("most_replicas must not be less than replicas")
        return self

    @model_validator(mode="after")
    def _default_within_limit(self) -> Self:
        if self.max_tokens_limit is not None and self.default_max_tokens > self.max_tokens_limit:
            raise ValueError("default_max_tokens must not exceed max_tokens_limit")
        return self
