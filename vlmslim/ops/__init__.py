"""Pure tensor functions that several methods or the engine share. Nothing here knows a method or a model class."""
