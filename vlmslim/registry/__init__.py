"""Methods by name: find their classes, make them, name them, list them."""

from vlmslim.registry.classes import (
    GROUP,
    BrokenMethod,
    file_of,
    is_method_name,
    method_class,
    method_names,
    the_method,
)
from vlmslim.registry.listing import BASELINES, Listing, listings
from vlmslim.registry.make import Spec, build, method, options_of, parse_method
from vlmslim.registry.names import address_of, label, name_of

__all__ = [
    "BASELINES",
    "GROUP",
    "BrokenMethod",
    "Listing",
    "Spec",
    "address_of",
    "build",
    "file_of",
    "is_method_name",
    "label",
    "listings",
    "method",
    "method_class",
    "method_names",
    "name_of",
    "options_of",
    "parse_method",
    "the_method",
]
