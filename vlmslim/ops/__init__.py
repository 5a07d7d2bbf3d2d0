"""General tensor functions of methods and the engine. Nothing here knows a method or a model class."""
