from .stages import squeeze_in_stages as squeeze_in_stages
