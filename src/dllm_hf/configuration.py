"""What the configurations of all families share."""

from typing import Any


class PublishedRopeTheta:
    """Writes `rope_theta`, which the original code reads, beside the library's `rope_parameters`. Goes before the
    library's configuration in a class's bases."""

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values["rope_theta"] = (self.rope_parameters or {}).get("rope_theta", self.default_theta)
        return values
