"""The two ways in which a comparison fails."""


class ConfigError(ValueError):
    """A comparison that cannot be run or read as it is; the message says what to write instead."""


class CellError(RuntimeError):
    """A cell that could not be evaluated; the message names it. Finished cells stay."""
