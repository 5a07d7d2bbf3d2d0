"""Options of methods: the check against their annotations, and those that many methods share."""
