"""A plugin of pytest for `planted_faults.py`: Hypothesis makes no failing example smaller, which takes minutes."""

from hypothesis import Phase, settings

settings.register_profile("no shrinking", phases=(Phase.explicit, Phase.reuse, Phase.generate))
settings.load_profile("no shrinking")
