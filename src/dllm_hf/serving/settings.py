"""`Settings` of a server."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """What holds for all requests.

    name: of the model, for clients.
    api_key: None lets everybody in.
    allowed_origins: whose pages may call the server from a browser (CORS); its own page always may.
    max_body_bytes: of a request.
    max_choices: completions that one request may ask for, prompts times `n`.
    request_timeout: seconds after which a request ends with what is final.
    shutdown_timeout: seconds that requests in flight have to finish after SIGTERM.
    log_prompts: whether the log shows prompts.
    """

    name: str
    api_key: str | None = None
    allowed_origins: list[str] = field(default_factory=list)
    max_body_bytes: int = 4 * 2**20
    max_choices: int = 128
    request_timeout: float = 600.0
    shutdown_timeout: float = 30.0
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise ValueError("`api_key` must be of printable ASCII characters, and at least one.")
        for origin in self.allowed_origins:
            if origin != "*" and "://" not in origin:
                raise ValueError(
                    f"`allowed_origins` has {origin!r}: an origin is https://host, with its port if it has one."
                )
        for name in ("max_body_bytes", "max_choices", "request_timeout"):
            if not getattr(self, name) > 0:  # nor NaN
                raise ValueError(f"`{name}` must be above 0, but is {getattr(self, name)}.")
        if not self.shutdown_timeout >= 0:
            raise ValueError(f"`shutdown_timeout` must be at least 0, but is {self.shutdown_timeout}.")
